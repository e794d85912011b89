"""How activations lie in memory: folded for fast convolutions, and in no other order than alone where that counts.

A pass folds only what has one memory format alone, so of a folded activation that order is known, and random masks are
drawn by it. A model's slice of what is made from one, such as a part of it, has gaps between its elements, which tells
it from any other. Whatever asks for its memory order then, or edits in place what shares its memory with others alone
and not here, raises `LayoutMatters`, and the pass is run again without folding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Pass
from .unwrap import call_unwrapped


class LayoutMatters(Exception):
    """Something asked for the memory order of an activation that lies in another order than it has alone."""


def is_folded(stack: Tensor) -> bool:
    """Say whether `[M, B, C, H, W]` lies in memory as channels_last `[B, M * C, H, W]`."""
    if stack.dim() != 5 or not stack.numel():
        return False
    models, _, channels, height, width = stack.shape
    row = models * channels
    strides = (channels, height * width * row, 1, width * row, row)
    return all(size == 1 or have == want for size, have, want in zip(stack.shape, stack.stride(), strides, strict=True))


def has_gaps(tensor: Tensor) -> bool:
    """Say whether there is memory between a tensor's numbers that is not its own."""
    return not torch.ops.aten.is_non_overlapping_and_dense(tensor)


def row_alone(mode: Pass, stack: Tensor, stacked: bool) -> Tensor:
    """Return a tensor like one model's slice, in the memory order that it has alone, but perhaps with other numbers."""
    row = stack[0] if stacked else stack
    if not has_gaps(row) or (has_gaps(stack) and not mode.folded):
        return row
    if mode.folded and not is_folded(stack):
        raise LayoutMatters
    return torch.empty_like(row, memory_format=mode.folded or torch.preserve_format)


def check_edit(mode: Pass, args: tuple) -> None:
    """Raise `LayoutMatters` if the tensor to be edited in place is a copy of what is a view alone."""
    if isinstance(args[0], Tensor):
        storage = call_unwrapped(mode, lambda stacks, _: stacks[0].untyped_storage()._cdata, args[:1])
        if storage in mode.copies:
            raise LayoutMatters
