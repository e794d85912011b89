"""ReLU and the max-pooling after it: where nothing in a window is above zero, the pooling stops the gradient itself.

So the ReLU, which would read its whole output again to stop it, has nothing left to do. It takes a gradient as it is
only if that is the very tensor which the pooling has made. Between the two, the gradient is another one than alone.
So where the model shows the ReLU's output to anybody, each does its own work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import is_folded
from ..registry import Pass, rule
from ..unwrap import call_unwrapped


class _ReLU(torch.autograd.Function):
    """ReLU of folded activations.

    Attributes of its node:
        stopped: a gradient that is zero already where it has to be; while it is held, autograd adds nothing to it.
        shown: whether somebody may ask for the gradient of the output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(out := x.relu())
        ctx.stopped, ctx.shown = None, False
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (out,), stopped, ctx.stopped = ctx.saved_tensors, ctx.stopped, None
        if stopped is not None and stopped.data_ptr() == gradient.data_ptr():
            return gradient
        return torch.ops.aten.threshold_backward(gradient, out, 0)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rectifier: Any, *how: Any) -> Tensor:
        largest, places = torch.ops.aten.max_pool2d_with_indices(x, *how)
        ctx.save_for_backward(x, places, largest.clone())  # the model may edit its own
        ctx.rectifier, ctx.how = rectifier, how
        return largest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, places, largest = ctx.saved_tensors
        if not ctx.rectifier.shown:
            gradient = torch.ops.aten.threshold_backward(gradient, largest, 0)
        gradient = torch.ops.aten.max_pool2d_with_indices_backward(gradient, x, *ctx.how, places)
        if not ctx.rectifier.shown:
            ctx.rectifier.stopped = gradient
        return gradient, None, *[None] * len(ctx.how)


@rule(torch.relu, Tensor.relu)
def _relu(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        return _ReLU.apply(stacks[0]) if stacked[0] and is_folded(stacks[0]) else NotImplemented

    return call_unwrapped(mode, run, args) if mode.folded and not kwargs else NotImplemented


def pool_rectified(rectifier: Any, x: Tensor, *how: Any) -> Tensor:
    """Return the max-pooling of channels_last `[B, C, H, W]` that a ReLU has made, whose node is `rectifier`."""
    return _MaxPool.apply(x, rectifier, *how, *([], 0, 1, False)[len(how) - 1 :])


def is_rectifier(node: Any) -> bool:
    """Say whether a node of the graph is that of a ReLU which can be spared its gradient."""
    return type(node) is _ReLU._backward_cls


def show_gradient(stack: Tensor) -> None:
    """Note that somebody may ask for the gradient of a stacked tensor."""
    if is_rectifier(stack.grad_fn):
        stack.grad_fn.shown = True
