"""Max-pooling in a step that is compiled: its gradient is looked up, where inductor would scatter it.

Of each window one number takes the gradient. Where windows do not overlap, every number can tell by its place in the
window whether it is that one, in one loop. After a ReLU, a window whose largest number is not above zero has no such
place, so the gradient need not pass the ReLU, which would read all its outputs again.
"""

from __future__ import annotations

from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import is_folded
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
        (x,), models = stacks, mode.num_models
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        if not stacked[0] or order.index(3) > order.index(4):
            return NotImplemented
        folded = is_folded(x)  # inductor keeps this layout only where the models are channels for it as well
        images = x.transpose(0, 1).flatten(1, 2) if folded else x.flatten(0, 1)
        out = _LookedUp.apply(images, window, rectify)
        return out.unflatten(1, (models, -1)).transpose(0, 1) if folded else out.unflatten(0, (models, -1))

    return call_unwrapped(mode, run, [source if rectify else x])


class _LookedUp(torch.autograd.Function):
    """Max-pooling of `[B, C, H, W]`, perhaps with a ReLU before it.

    The gradient is made in the order in which the numbers lie in memory; inductor would write it in another, and then
    once more in this one. Each column of the windows uses what arrives anew: inductor computes what has several uses
    once, and else at each number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[int, int], rectify: bool) -> Tensor:
        largest, place = largest_of_windows(x, window, rectify)
        ctx.save_for_backward(place)
        ctx.how = window, x.shape[2:], sorted(range(4), key=x.stride, reverse=True)
        return largest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (place,), (window, size, order) = ctx.saved_tensors, ctx.how
        rows, columns = order.index(2), order.index(3) + 1
        place, gradient = (t.permute(order).unsqueeze(rows + 1) for t in (place.to(gradient.dtype), gradient))
        lines = torch.arange(window[0], dtype=gradient.dtype, device=gradient.device) * window[1]
        lines = lines.view(*[1] * (rows + 1), -1, *[1] * (3 - rows))
        parts = [torch.where(place == lines + i, gradient, 0.0) for i in range(window[1])]
        mine = torch.stack(parts, columns + 1).flatten(columns, columns + 1).flatten(rows, rows + 1)
        mine = mine.permute([order.index(d) for d in range(4)])
        return pad(mine, (0, size[1] - mine.shape[3], 0, size[0] - mine.shape[2])), None, None


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
