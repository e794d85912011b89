"""What reshapes a tensor, or lays it out anew: alone it may be a view, where under vmap the numbers have to be copied.

Until one of the two is edited in place nobody can tell, so both are noted; see `layout.check_edit`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import has_gaps, is_folded, keeps_order, refuse_layout, row_alone, storage_of, whole_of
from ..registry import Pass, rule
from ..unwrap import call_unwrapped

_FLAT = {Tensor.view, Tensor.flatten, torch.flatten, Tensor.reshape, torch.reshape}


@rule(*_FLAT, Tensor.ravel, torch.ravel, Tensor.contiguous, Tensor.to)
def _reshape(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """`view` and `flatten` of a folded activation have to copy, too."""
    if not args or args[0].layout is not torch.strided:
        return NotImplemented
    x, *rest = args

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        return stacks[0].contiguous() if stacked[0] and is_folded(stacks[0]) else NotImplemented

    copy = call_unwrapped(mode, run, [x]) if mode.folded and x.dim() == 4 and operator in _FLAT else NotImplemented
    out = operator(x if copy is NotImplemented else copy, *rest, **kwargs)
    storages = {storage_of(x), storage_of(out)}
    if len(storages) > 1 and out.dtype == x.dtype and (mode.folded or _keeps_order_alone(mode, x)):
        mode.copies |= storages
    return out


def _keeps_order_alone(mode: Pass, x: Tensor) -> bool:
    """Say whether a tensor may lie in its order alone; of what a broadcast has made, nobody knows."""
    return keeps_order(x) or not (keeps_order(whole_of(x)) or mode.channels_last)


@rule(torch.as_strided, Tensor.as_strided, Tensor.stride, Tensor.is_contiguous)
def _order(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """Answer what a model asks of its memory; to walk through it in strides takes the very memory that it has alone."""

    def run(stacks: list[Tensor], stacked: list[bool]) -> list[Any]:
        row = row_alone(mode, stacks[0], stacked[0])
        if operator in (Tensor.stride, Tensor.is_contiguous):
            return [operator(row, *args[1:], **kwargs)]
        if stacked[0] and has_gaps(stacks[0][0]):
            refuse_layout(mode, "it reads its memory in strides, where other models' numbers lie in between")
        return NotImplemented

    answer = call_unwrapped(mode, run, args[:1]) if args else NotImplemented
    return answer if answer is NotImplemented else answer[0]
