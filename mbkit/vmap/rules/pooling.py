"""Max-pooling in a step that is compiled: its gradient is looked up, where inductor would scatter it.

Of each window one number takes the gradient. Where windows do not overlap, every number can tell by its place in the
window whether it is that one, in one loop. After a ReLU, a window whose largest number is not above zero has no such
place, so the gradient need not pass the ReLU, which would read all its outputs again. Sixteen LeNets take about
0.7 of the time.
"""

from __future__ import annotations

from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..registry import RULES_WHEN_TRACED, Pass, rule
from ..unwrap import call_unwrapped

_LARGEST = 9  # numbers in a window: each is compared with the largest
_NOWHERE = -1


@rule(torch.relu, Tensor.relu, table=RULES_WHEN_TRACED)
def _relu(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """Note what a ReLU was given, for a pooling that may follow."""
    out = operator(*args, **kwargs)
    if args:
        mode.rectified[id(out)] = (out, args[0], _versions(mode, [out, args[0]]))
    return out


def _versions(mode: Pass, tensors: list[Tensor]) -> list[int]:
    """Return the versions of the tensors in memory; those of the tensors that one model sees do not count its edits."""
    return call_unwrapped(mode, lambda stacks, _: [stack._version for stack in stacks], tensors)


@rule(torch.max_pool2d, table=RULES_WHEN_TRACED)
def _max_pool2d(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """Where windows overlap or are large, pooling is traced as in any step."""
    x, window, stride, padding, dilation, ceil_mode = (*args, *(None, 0, 1, False)[len(args) - 2 :])
    window = (window, window) if isinstance(window, int) else tuple(window)
    apart = stride in (None, [], window, list(window)) or (stride, stride) == window
    plain = not kwargs and not ceil_mode and {padding} <= {0, (0, 0)} and {dilation} <= {1, (1, 1)}
    if not (apart and plain and x.dim() == 4 and window[0] * window[1] <= _LARGEST):
        return NotImplemented
    out, source, versions = mode.rectified.get(id(x), (None, x, []))
    rectify = out is not None and versions == _versions(mode, [out, source])  # neither has been edited since

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        order = sorted(range(stacks[0].dim()), key=stacks[0].stride, reverse=True)
        if not stacked[0] or order.index(3) > order.index(4):
            return NotImplemented
        return _LookedUp.apply(stacks[0], window, rectify, order)

    return call_unwrapped(mode, run, [source if rectify else x])


class _LookedUp(torch.autograd.Function):
    """Max-pooling of `[M, B, C, H, W]`, perhaps with a ReLU before it.

    Args:
        order: the dimensions as they lie in memory. The gradient is made in this order; inductor would write it in
            another, and then once more in this one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[int, int], rectify: bool, order: list[int]) -> Tensor:
        largest, place = largest_of_windows(x, window, rectify)
        ctx.save_for_backward(place)
        ctx.how = window, x.shape[3:], order
        return largest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (place,), (window, size, order) = ctx.saved_tensors, ctx.how
        rows, columns = order.index(3), order.index(4)

        def spread(x: Tensor) -> Tensor:
            return x.permute(order).unsqueeze(rows + 1).unsqueeze(columns + 2)

        shape = [1] * 7
        shape[rows + 1], shape[columns + 2] = window
        places = torch.arange(window[0] * window[1], dtype=gradient.dtype, device=gradient.device).view(shape)
        mine = torch.where(spread(place.to(gradient.dtype)) == places, spread(gradient), 0.0)
        mine = mine.flatten(rows, rows + 1).flatten(columns, columns + 1)
        mine = mine.permute([order.index(d) for d in range(5)])
        return pad(mine, (0, size[1] - mine.shape[4], 0, size[0] - mine.shape[3])), None, None, None


def largest_of_windows(x: Tensor, window: tuple[int, int], rectify: bool) -> tuple[Tensor, Tensor]:
    """Return the largest number of each window, and its place there: the last NaN, else the first of the largest.

    Args:
        x: `[..., H, W]`.
        window: rows and columns.
        rectify: numbers below zero count as zero, and a window without a number above zero has the place -1.
    """
    height, width = (size // n * n for size, n in zip(x.shape[-2:], window, strict=True))
    parts = [x[..., i : height : window[0], j : width : window[1]] for i, j in product(*map(range, window))]
    largest = reduce(torch.maximum, parts)
    place = torch.full((), len(parts) - 1.0, dtype=x.dtype, device=x.device)
    for i, part in reversed([*enumerate(parts[:-1])]):
        place = torch.where(part == largest, float(i), place)
    for i, part in enumerate(parts):
        place = torch.where(part != part, float(i), place)
    if rectify:
        place, largest = torch.where(largest <= 0, float(_NOWHERE), place), largest.relu()
    return largest, place.to(torch.int8)
