"""From the tensors that a model sees under vmap to the stacked tensors in memory, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from .errors import BatchingError
from .gradients import mark_rows

__all__ = ["as_one_model_sees", "as_stacked", "on_stacks", "stack_alike"]


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
    level = functorch.maybe_get_level(index)
    if functorch.maybe_current_level() != level:
        raise BatchingError(
            "an operator with a rule of mbkit's is called inside torch.func (grad, vmap, …) in the model, where the "
            "models' tensors cannot be taken apart: name the layer in ModelBatch(..., model_by_model=[…])"
        )
    dims = [functorch.maybe_get_bdim(t) if functorch.is_batchedtensor(t) else None for t in tensors]
    stacks = [t if d is None else functorch.get_unwrapped(t) for t, d in zip(tensors, dims, strict=True)]
    stacks = [t if not d else t.movedim(d, 0) for t, d in zip(stacks, dims, strict=True)]
    with temporarily_pop_interpreter_stack():  # below vmap, where random numbers may be drawn
        outputs = function(stacks, [d is not None for d in dims])
    return tuple(functorch._add_batch_dim(t, 0, level) for t in outputs)


def as_one_model_sees(stack: Tensor) -> Tensor:
    """Return a tensor `[M, ...]` as each model sees its own of it, inside of vmap."""
    return functorch._add_batch_dim(stack, 0, functorch.maybe_current_level())


def as_stacked(tensor: Tensor) -> Tensor | None:
    """Return a tensor that each model sees its own of as one of `[M, ...]`; None where all see the same."""
    if not functorch.is_batchedtensor(tensor):
        return None
    return functorch.get_unwrapped(tensor).movedim(functorch.maybe_get_bdim(tensor), 0)


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
