"""Convolution and pooling on a CPU: M models folded into the channels of one grouped, channels_last convolution.

torch's CPU kernels run a grouped convolution about three times as fast in channels_last memory as in the contiguous
layout that vmap's own rule uses. Between the layers the activations stay as they lie, `[B, H, W, M, C]` in memory,
so folding costs no copy.

Layout stays an inner matter. Only what is contiguous alone is folded, and a model's slice of a folded activation has
gaps between its elements, which tells it from any other. Whatever asks for its memory order (a random mask, an edit
in place through a view) raises `LayoutMatters`, and the pass is run again without folding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Pass
from ..unwrap import on_stacks

__all__ = ["RULES", "LayoutMatters", "check_edit", "check_order", "is_folded"]

FOLDED_DTYPES = {torch.float32}  # where the grouped kernels are fast; double precision has no such kernel


class LayoutMatters(Exception):
    """Something asked for the memory order of an activation that lies in another order than it has alone."""


def is_folded(stack: Tensor) -> bool:
    """Say whether `[M, B, C, H, W]` lies in memory as channels_last `[B, M * C, H, W]`."""
    if stack.dim() != 5 or not stack.numel():
        return False
    models, _, channels, height, width = stack.shape
    row = models * channels
    return stack.stride() == (channels, height * width * row, 1, width * row, row)


def _fold(stack: Tensor) -> Tensor:
    """`[M, B, C, H, W]` to channels_last `[B, M * C, H, W]`, without a copy where it is folded already."""
    return stack.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _unfold(folded: Tensor, num_models: int) -> Tensor:
    """Channels_last `[B, M * C, H, W]` to `[M, B, C, H, W]`, a view."""
    return _ChannelsLastGradient.apply(folded).unflatten(1, (num_models, -1)).transpose(0, 1)


class _ChannelsLastGradient(torch.autograd.Function):
    """Does nothing, but hands a channels_last gradient back: pooling's backward takes its whole layout from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


def check_order(mode: Pass, stacks: list[Tensor], stacked: list[bool]) -> None:
    """Raise `LayoutMatters` if a model's slice of a stack has gaps: its memory order is not the one it has alone."""
    if mode.folded:
        for stack, is_stacked in zip(stacks, stacked, strict=True):
            if is_stacked and not torch.ops.aten.is_non_overlapping_and_dense(stack[0]):
                raise LayoutMatters


def check_edit(mode: Pass, args: tuple) -> None:
    """Raise `LayoutMatters` if the tensor to be edited in place is a copy of what is a view alone."""

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        if stacks[0].untyped_storage()._cdata in mode.copies:
            raise LayoutMatters
        return (mode.index_values,)

    if mode.copies and isinstance(args[0], Tensor):
        on_stacks(run, mode.index, args[:1])


def _foldable(mode: Pass, stack: Tensor, stacked: bool) -> bool:
    """Fold only what is contiguous alone (then a folded layout has one meaning) and what the fast kernels take."""
    contiguous = is_folded(stack) or (stack[0] if stacked else stack).is_contiguous()
    return mode.folding and stack.dim() == 4 + stacked and stack.dtype in FOLDED_DTYPES and contiguous


def _conv2d(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Tensor:
    x, weight, *rest = args
    if not mode.folding or kwargs:
        return function(*args, **kwargs)
    bias, stride, padding, dilation, groups = (*rest, *(None, 1, 0, 1, 1)[len(rest) :])
    plan: list[bool] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor, ...]:
        x, weight, *biases = stacks
        if not (stacked[1] and all(stacked[2:]) and _foldable(mode, x, stacked[0]) and weight[0].is_contiguous()):
            return (mode.index_values,)
        plan.append(True)
        if stacked[0]:
            x = _fold(x)
        elif groups > 1:
            x = x.repeat(1, mode.num_models, 1, 1)
        mode.folded = True
        one_group = not stacked[0] and groups == 1  # all models read the same channels
        bias = biases[0].flatten() if biases else None
        out = torch.conv2d(
            x.contiguous(memory_format=torch.channels_last),
            weight.flatten(0, 1).contiguous(memory_format=torch.channels_last),
            bias,
            stride,
            padding,
            dilation,
            1 if one_group else groups * mode.num_models,
        )
        return (_unfold(out, mode.num_models),)

    tensors = [x, weight] if bias is None else [x, weight, bias]
    out = on_stacks(run, mode.index, tensors)[0]
    return out if plan else function(*args)


def _pool(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Tensor:
    """Pooling treats each channel alone, so folded activations stay folded."""
    if not mode.folded:
        return function(*args, **kwargs)
    plan: list[bool] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        if not (stacked[0] and is_folded(stacks[0])):
            return (mode.index_values,)
        plan.append(True)
        return (_unfold(function(_fold(stacks[0]), *args[1:], **kwargs), mode.num_models),)

    out = on_stacks(run, mode.index, args[:1])[0]
    return out if plan else function(*args, **kwargs)


def _flatten(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Tensor:
    """`view` and `flatten` of a folded activation have to copy; the copy is noted, lest it be edited in place."""
    x, *rest = args
    if not mode.folded or x.dim() != 4:
        return function(*args, **kwargs)
    plan: list[bool] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        if not (stacked[0] and is_folded(stacks[0])):
            return (mode.index_values,)
        plan.append(True)
        copy = stacks[0].contiguous()
        mode.copies.add(copy.untyped_storage()._cdata)
        return (copy,)

    copy = on_stacks(run, mode.index, [x])[0]
    return function(copy if plan else x, *rest, **kwargs)


RULES = {torch.conv2d: _conv2d}
RULES |= {getattr(torch._C._nn, name): _pool for name in ("avg_pool2d", "adaptive_avg_pool2d")}
RULES |= {torch.max_pool2d: _pool}
RULES |= dict.fromkeys((Tensor.view, Tensor.flatten, torch.flatten, Tensor.reshape, torch.reshape), _flatten)
