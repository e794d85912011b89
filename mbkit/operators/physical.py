"""From the tensors that a model sees under vmap to the stacked tensors in memory, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .locate import BatchingError
from .reach import mark_rows

__all__ = ["on_stacks", "stack_alike"]


class _OnStacks(torch.autograd.Function):
    """Hands the stacked tensors to a function; autograd, which runs outside vmap, records what it does with them."""

    @staticmethod
    def forward(function, index, *tensors):
        raise BatchingError("mbkit met an operator inside a transform of the model's own (torch.func.grad, vmap, …)")

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing to keep: there is no backward, because autograd stays outside vmap."""

    @staticmethod
    def vmap(info, in_dims, function, index, *tensors):
        if in_dims[1] is None:  # an inner vmap, called by the model itself, whose M is not ours
            raise BatchingError("an operator with a rule of its own was called inside the model's own torch.vmap")
        stacks = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[2:], strict=True)]
        outputs = function(stacks, [d is not None for d in in_dims[2:]])
        return outputs, tuple(0 for _ in outputs)


def on_stacks(
    function: Callable[[list[Tensor], list[bool]], tuple[Tensor, ...]], index: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Call `function` on the tensors as they lie in memory, and return its outputs as one model sees them.

    Args:
        function: gets the tensors, `[M, ...]` where they differ between the models and `[...]` where they are
            shared, and a flag for each that says which; returns a tuple of tensors `[M, ...]`.
        index: the model's number, `torch.arange(M)` under vmap. It makes vmap look even where no tensor is stacked.
        tensors: as the model sees them.
    """
    return _OnStacks.apply(function, index, *tensors)


def stack_alike(tensors: Sequence[Tensor]) -> Tensor:
    """Stack M tensors so that each slice keeps the strides that it has alone.

    Random numbers are filled in memory order, so a layout lost here would give other masks further on.
    """
    first = tensors[0]
    if first.is_contiguous() or not first.numel():
        return mark_rows(torch.stack(list(tensors)))
    order = sorted(range(first.dim()), key=lambda d: first.stride(d), reverse=True)  # outermost in memory first
    inverse = [order.index(d) for d in range(first.dim())]
    stacked = mark_rows(torch.stack([t.permute(order) for t in tensors]))
    return stacked.permute(0, *(1 + d for d in inverse))
