"""Reads of Python values from tensors, and tensors made from nothing, as M models see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BatchingError
from ..per_model import agreed
from ..registry import Pass
from ..unwrap import on_stacks, stack_alike

__all__ = ["RULES"]


def _value(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Any:
    """`item`, `float`, `bool`, `tolist`: one Python value when all models have the same, an error otherwise."""
    values: list[Any] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        x = stacks[0]
        values.extend(function(row, *args[1:], **kwargs) for row in (x if stacked[0] else [x]))
        return (torch.zeros(mode.num_models, device=x.device),)

    on_stacks(run, mode.index, args[:1])
    return agreed(values, f"what {function.__name__.strip('_')}() reads from a tensor")


def _of_autograd(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Any:
    """`requires_grad`, `is_leaf`, `grad_fn`: vmap hides them; a model that branches on them alone must do so here."""
    if torch._C._functorch.is_gradtrackingtensor(args[0]):  # torch.func.grad inside the model answers for itself
        return function(*args)
    answer: list[Any] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        answer.append(function(stacks[0]))
        return (mode.index_values,)

    on_stacks(run, mode.index, args)
    return answer[0]


def _data(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Tensor:
    """`x.data` is refused by vmap; it is the same memory, and edits of it do not count for autograd."""

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        return (stacks[0].data if stacked[0] else stacks[0].data.expand(mode.num_models, *stacks[0].shape),)

    return on_stacks(run, mode.index, args)[0]


def _gradient(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Any:
    """`x.grad` would read as None."""
    raise BatchingError("forward reads .grad, which one model alone cannot be given here: pass what it needs as input")


def _made(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Tensor:
    """A tensor made from nothing gets one copy a model, so that each can fill its own in place."""

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        x = stacks[0]
        return (x if stacked[0] else stack_alike([x] * mode.num_models),)

    return on_stacks(run, mode.index, [function(*args, **kwargs)])[0]


_READS = "item tolist __bool__ __float__ __int__ __index__ __complex__".split()
_MADE = "empty zeros ones full empty_like zeros_like ones_like full_like empty_strided".split()
_NEW = "new_empty new_zeros new_ones new_full".split()

RULES = {getattr(Tensor, name): _value for name in _READS}
RULES |= {getattr(torch, name): _made for name in _MADE}
RULES |= {getattr(Tensor, name): _made for name in _NEW}
RULES |= {getattr(Tensor, name).__get__: _of_autograd for name in ("requires_grad", "is_leaf", "grad_fn")}
RULES[Tensor.data.__get__] = _data
RULES[Tensor.grad.__get__] = _gradient
