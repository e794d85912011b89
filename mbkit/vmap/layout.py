"""How activations lie in memory: folded for fast convolutions, and in no other order than alone where that counts.

Only what is contiguous alone is folded, and a model's slice of a folded activation has gaps between its elements,
which tells it from any other. Whatever asks for its memory order (a random mask, an edit in place through a view)
raises `LayoutMatters`, and the pass is run again without folding.
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
    return stack.stride() == (channels, height * width * row, 1, width * row, row)


def check_order(mode: Pass, stacks: list[Tensor], stacked: list[bool]) -> None:
    """Raise `LayoutMatters` if a model's slice of a stack has gaps: its memory order is not the one it has alone."""
    if mode.folded:
        for stack, is_stacked in zip(stacks, stacked, strict=True):
            if is_stacked and not torch.ops.aten.is_non_overlapping_and_dense(stack[0]):
                raise LayoutMatters


def check_edit(mode: Pass, args: tuple) -> None:
    """Raise `LayoutMatters` if the tensor to be edited in place is a copy of what is a view alone."""
    if isinstance(args[0], Tensor):
        storage = call_unwrapped(mode, lambda stacks, _: stacks[0].untyped_storage()._cdata, args[:1])
        if storage in mode.copies:
            raise LayoutMatters
