"""Recurrent layers, which vmap has no rule for: one batched cell for all models, or each model's fused kernel.

The fused kernels, one model after the other, give the lone bits and are no faster than a loop. The batched cell is one
`baddbmm` over all models a time step; it differs from them by rounding (1e-12 in float64), and between its layers it
drops what each model drops alone. It is taken where it is faster: on a CPU, for hidden sizes up to 128, and most of all
for many small models. float32 LSTMs without projections have oneDNN's kernel when they are alone, so there it takes 16.
Layers over packed sequences, single cells, autocast and devices that were not measured stay with the fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..in_turn import model_by_model
from ..per_model import PerModel
from ..registry import RULES_WITH_SETTINGS, Pass, rule
from ..unwrap import as_stacked, call_unwrapped, expanded

LARGEST_HIDDEN_SIZE = 128

State = tuple[Tensor, ...]


def _tanh_cell(gates: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None) -> State:
    return (torch.baddbmm(gates, state[0], w_hh).tanh(),)


def _relu_cell(gates: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None) -> State:
    return (torch.baddbmm(gates, state[0], w_hh).relu(),)


def _lstm_cell(gates: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None) -> State:
    i, f, g, o = torch.baddbmm(gates, state[0], w_hh).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else h @ w_hr.mT, c)


def _gru_cell(gates: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None) -> State:
    (h,) = state
    size = h.shape[-1]
    own = h @ w_hh if b_hh is None else torch.baddbmm(b_hh, h, w_hh)
    r, z = (gates[..., : 2 * size] + own[..., : 2 * size]).sigmoid().chunk(2, -1)
    n = torch.addcmul(gates[..., 2 * size :], r, own[..., 2 * size :]).tanh()
    return (torch.lerp(n, h, z),)


def _direction(
    x: Tensor, state: State, weights: Sequence[Tensor], biases: bool, cell: Callable, backwards: bool
) -> Any:
    """Run one direction of one layer: `[M, T, B, I]` to `[M, T, B, H]`, and the last state."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if biases else (None, None)
    w_hr = rest[-1] if len(rest) in (1, 3) else None
    if biases and cell is not _gru_cell:  # added before they are viewed, or their gradients would share memory
        b_ih, b_hh = b_ih + b_hh, None
    b_ih, b_hh = (None if b is None else b.unsqueeze(1) for b in (b_ih, b_hh))
    flat = x.flatten(1, 2)  # [M, T * B, I]
    gates = torch.bmm(flat, w_ih.mT) if b_ih is None else torch.baddbmm(b_ih, flat, w_ih.mT)
    steps = list(gates.unflatten(1, x.shape[1:3]).unbind(1))
    outputs = []
    for step in reversed(steps) if backwards else steps:
        state = cell(step, state, w_hh.mT, b_hh, w_hr)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, 1), state


def _batched(cell: Callable, mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """One cell for all models where that is faster."""
    packed = not kwargs and not isinstance(args[3], bool)
    if kwargs or packed or not _worthwhile(mode, args[0], args[2], cell):
        return model_by_model(mode, operator, args, kwargs)
    x, hx, weights, biases, layers, dropout, train, bidirectional, batch_first = args
    initial = hx if isinstance(hx, (tuple, list)) else (hx,)
    rates = dropout.values if isinstance(dropout, PerModel) else [dropout] * mode.num_models
    directions = 2 if bidirectional else 1
    size = len(weights) // (layers * directions)

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor, ...]:
        x, *stacks = expanded(mode, stacks, stacked)
        states, own = stacks[: len(initial)], stacks[len(initial) :]
        x = x.transpose(1, 2) if batch_first else x  # [M, T, B, I]
        ends = []
        for layer in range(layers):
            results = []
            for way in range(directions):
                i = layer * directions + way
                state = tuple(s[:, i] for s in states)
                results.append(_direction(x, state, own[i * size : (i + 1) * size], biases, cell, way == 1))
            x = results[0][0] if directions == 1 else torch.cat([out for out, _ in results], -1)
            ends += [end for _, end in results]
            if train and any(rates) and layer < layers - 1:
                x = x * mode.streams.dropout_masks(torch.empty_like(x[0]), rates)
        return (x.transpose(1, 2) if batch_first else x, *(torch.stack(end, 1) for end in zip(*ends, strict=True)))

    return call_unwrapped(mode, run, [x, *initial, *weights])


def _worthwhile(mode: Pass, x: Tensor, weights: Sequence[Tensor], cell: Callable) -> bool:
    """Say whether the batched cell is the faster one."""
    if mode.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not x.numel():
        return False
    w_hh = weights[1]
    projects = cell is _lstm_cell and w_hh.shape[1] != w_hh.shape[0] // 4
    fewest = 16 if cell is _lstm_cell and x.dtype == torch.float32 and not projects else 2
    known = x.dtype == w_hh.dtype and x.dtype in (torch.float32, torch.float64)
    return known and w_hh.shape[1] <= LARGEST_HIDDEN_SIZE and mode.num_models >= fewest


@rule(torch._pack_padded_sequence, torch._pad_packed_sequence)
def _repacked(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """Pack or pad the sequences of all models as those of one with M times as many features; lengths are shared."""
    if as_stacked(args[0]) is None or as_stacked(args[1]) is not None:
        return NotImplemented
    sequences, features = (2, 1) if operator is torch._pack_padded_sequence else (1, 2)
    lengths = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        made, found = operator(stacks[0].movedim(0, sequences), *args[1:], **kwargs)
        lengths.append(found)
        return made.movedim(features, 0)

    return call_unwrapped(mode, run, args[:1]), lengths[0]


_CELLS = {"lstm": _lstm_cell, "gru": _gru_cell, "rnn_tanh": _tanh_cell, "rnn_relu": _relu_cell}
for _name, _cell in _CELLS.items():
    rule(getattr(torch, f"{_name}_cell"))(model_by_model)
    _rule = partial(_batched, _cell)
    rule(getattr(torch, _name))(rule(getattr(torch, _name), table=RULES_WITH_SETTINGS)(_rule))
