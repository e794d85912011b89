"""Messages along a graph's edges: rows are taken, added and reduced by a list of places that all models share.

vmap makes an index for every single number out of that list, with which torch takes three times as long as it takes for
one model after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Pass, rule
from ..unwrap import as_stacked, call_unwrapped, expanded


@rule(torch.index_select, Tensor.index_select, order=lambda input, dim, index: ((input, dim, index), {}))
def _take(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    if kwargs or as_stacked(args[2]) is not None or args[1] not in range(-args[0].dim(), args[0].dim()):
        return NotImplemented
    x, dim, places = args

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        return operator(stacks[0], dim % x.dim() + 1, places) if stacked[0] else NotImplemented

    return call_unwrapped(mode, run, [x])


def _in_order(input: Any, dim: Any, index: Any, src: Any, *how: Any, **rest: Any) -> tuple[tuple, dict]:
    return (input, dim, index, src, *([rest.pop("reduce")] if "reduce" in rest else how)), rest


@rule(torch.scatter_add, Tensor.scatter_add, Tensor.scatter_add_, order=_in_order)
def _add(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    places = None if kwargs else _places(*args)
    if places is None:
        return NotImplemented
    x, dim, _, rows = args

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        if not stacked[0]:
            return NotImplemented
        add = Tensor.index_add_ if operator is Tensor.scatter_add_ else torch.index_add
        return add(stacks[0], dim % x.dim() + 1, places, expanded(mode, stacks, stacked)[1])

    out = call_unwrapped(mode, run, [x, rows])
    return x if operator is Tensor.scatter_add_ and out is not NotImplemented else out


@rule(torch.select_scatter, Tensor.select_scatter, order=lambda input, src, dim, index: ((input, src, dim, index), {}))
def _replace(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """One row put in the place of another: vmap adds up the gradients of all models' rows in each."""
    x, row, dim, index = args

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        return operator(*expanded(mode, stacks, stacked), range(x.dim())[dim] + 1, index)

    return call_unwrapped(mode, run, [x, row])


@rule(torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_, order=_in_order)
def _reduce(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """One call for the rows of all models, laid end to end: places beyond them are beyond the last model's, too."""
    in_place, places = operator is Tensor.scatter_reduce_, _places(*args[:4]) if len(args) > 3 else None
    if places is None or args[1] % args[0].dim():
        return NotImplemented
    x, _, index, rows, *how = args

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        if not stacked[0] or (in_place and not stacks[0].is_contiguous()):
            return NotImplemented
        start = torch.arange(mode.num_models, device=places.device) * len(x)
        flat = (places + start.unsqueeze(1)).view(-1, *[1] * (x.dim() - 1)).expand(-1, *index.shape[1:])
        rows = expanded(mode, stacks, stacked)[1].flatten(0, 1)
        return operator(stacks[0].flatten(0, 1), 0, flat, rows, *how, **kwargs).view_as(stacks[0])

    out = call_unwrapped(mode, run, [x, rows])
    return x if in_place and out is not NotImplemented else out


def _places(x: Tensor, dim: int, index: Tensor, rows: Tensor) -> Tensor | None:
    """Return the list that an index repeats for every number in a row; None if it does not, or is each model's own."""
    if not 0 < x.dim() == index.dim() == rows.dim() or as_stacked(index) is not None:
        return None
    if dim not in range(-x.dim(), x.dim()) or index.shape != rows.shape:
        return None
    across = [d for d in range(x.dim()) if d != dim % x.dim()]
    if any(index.shape[d] != x.shape[d] or (index.stride(d) and index.shape[d] > 1) for d in across):
        return None
    return index[tuple(0 if d in across else slice(None) for d in range(x.dim()))] if index.numel() else None
