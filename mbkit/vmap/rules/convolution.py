"""Convolution and pooling on a CPU: M models folded into the channels of one grouped, channels_last convolution.

torch's CPU kernels run a grouped convolution about three times as fast in channels_last memory as in the contiguous
layout that vmap's own rule uses. Between the layers the activations stay as they lie, `[B, H, W, M, C]` in memory,
so folding costs no copy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..layout import LayoutMatters, is_channels_last, is_folded
from ..registry import Pass, rule
from ..unwrap import call_unwrapped
from .grouped_convolution import conv_on_a_gpu, in_order, on_a_cpu, settings_of
from .rectified import is_rectifier, pool_rectified

FOLDED_DTYPES = {torch.float32}  # where the grouped kernels are fast; double precision has no such kernel


def _fold(stack: Tensor) -> Tensor:
    """`[M, B, C, H, W]` to channels_last `[B, M * C, H, W]`, without a copy where it is folded already."""
    return stack.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _unfold(folded: Tensor, num_models: int) -> Tensor:
    """Channels_last `[B, M * C, H, W]` to `[M, B, C, H, W]`, a view."""
    if folded.requires_grad:  # pooling's backward takes its layout from the gradient
        folded.register_hook(partial(Tensor.contiguous, memory_format=torch.channels_last))
    return folded.unflatten(1, (num_models, -1)).transpose(0, 1)


def _order(mode: Pass, x: Tensor, stacked: bool, weight: Tensor) -> torch.memory_format | None:
    """Return the memory format that one model's output has alone; None for what the fast kernels do not take.

    With one image the stride of the batch is any number, by which batch_norm's kernel takes one layout for another.
    """
    if not (mode.folding and x.dim() == 4 + stacked and x.shape[stacked] > 1 and x.dtype in FOLDED_DTYPES):
        return None
    known, orders = (torch.contiguous_format, torch.channels_last), [mode.folded] if is_folded(x) else []
    rows = [weight[0]] if orders else [weight[0], x[0] if stacked else x]
    orders += [next((order for order in known if row.is_contiguous(memory_format=order)), None) for row in rows]
    return None if None in orders else known[known[1] in orders]


@rule(torch.conv2d, order=in_order)
def _conv2d(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    x, weight, *rest = args
    if not mode.folding or kwargs:
        return conv_on_a_gpu(mode, operator, args, kwargs)
    bias, (*how, groups) = settings_of(tuple(rest), 2)
    convolve = torch.conv2d if isinstance(how[1], str) else partial(on_a_cpu, mode.traced)

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        x, weight, *biases = stacks
        order = _order(mode, x, stacked[0], weight) if stacked[1] and all(stacked[2:]) else None
        if order is None:
            mode.channels_last |= not mode.folded and any(map(is_channels_last, (x, weight), stacked))
            return NotImplemented
        if mode.folded not in (None, order):
            raise LayoutMatters
        mode.folded = order
        if stacked[0]:
            x = _fold(x)
        elif groups > 1:
            x = x.repeat(1, mode.num_models, 1, 1)
        one_group = not stacked[0] and groups == 1  # all models read the same channels
        bias = biases[0].flatten() if biases else None
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight.flatten(0, 1)))
        out = convolve(x, weight, bias, *how, 1 if one_group else groups * mode.num_models)
        return _unfold(out, mode.num_models)

    return call_unwrapped(mode, run, [x, weight] if bias is None else [x, weight, bias])


@rule(torch.max_pool2d, torch._C._nn.avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def _pool(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """Pooling treats each channel alone, so folded activations stay folded."""

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        if not (stacked[0] and is_folded(stacks[0])):
            return NotImplemented
        of_relu = operator is torch.max_pool2d and not kwargs and is_rectifier(stacks[0].grad_fn)
        pool = partial(pool_rectified, stacks[0].grad_fn) if of_relu else operator
        out = _unfold(pool(_fold(stacks[0]), *args[1:], **kwargs), mode.num_models)
        return out.contiguous() if out[0, 0, 0].numel() == 1 else out  # what is flattened next stays a view

    return call_unwrapped(mode, run, args[:1]) if mode.folded else NotImplemented


@rule(torch.group_norm, torch.batch_norm)
def _normalize(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """vmap refuses groups in channels_last, and of one image batch_norm's kernel takes one layout for another."""
    x, *rest = args
    grouped, last = operator is torch.group_norm, is_channels_last(x, False)
    mode.channels_last |= last and not mode.folded
    if grouped and mode.folded:
        raise LayoutMatters  # torch's kernel costs more, folded, than the convolutions save
    if (grouped or len(x) == 1) and x.dim() == 4 and last:
        return operator(x.contiguous(), *rest, **kwargs).movedim(1, -1).contiguous().movedim(-1, 1)
    return NotImplemented
