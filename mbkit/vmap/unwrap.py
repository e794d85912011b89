"""From the batched tensors that a model sees under vmap to the stacked tensors in memory, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from .errors import BatchingError
from .gradients import mark_rows
from .registry import Pass

__all__ = ["as_one_model_sees", "as_stacked", "call_unwrapped", "expanded", "memory_order", "stack_alike"]


def call_unwrapped(mode: Pass, function: Callable[[list[Tensor], list[bool]], Any], tensors: Sequence[Tensor]) -> Any:
    """Call `function` below vmap on the tensors as they lie in memory, and return its result as one model sees it.

    Args:
        mode: the pass.
        function: gets the tensors, `[M, ...]` where they differ between the models and `[...]` where they are
            shared, and a flag for each that says which. A tensor `[M, ...]` that it returns, or a tuple of them, is
            wrapped; anything else is returned as it is.
        tensors: as the model sees them.
    """
    if functorch.maybe_current_level() != mode.level:
        raise BatchingError(
            "an operator with a rule of mbkit's is called inside torch.func (grad, vmap, …) in the model, where the "
            "models' tensors cannot be taken apart: name the layer in ModelBatch(..., model_by_model=[…])"
        )
    stacks = [as_stacked(t) for t in tensors]
    stacked = [t is not None for t in stacks]
    stacks = [t if stack is None else stack for t, stack in zip(tensors, stacks, strict=True)]
    with temporarily_pop_interpreter_stack():  # where random numbers may be drawn
        result = function(stacks, stacked)
    if isinstance(result, Tensor):
        return functorch._add_batch_dim(result, 0, mode.level)
    return tuple(functorch._add_batch_dim(t, 0, mode.level) for t in result) if isinstance(result, tuple) else result


def expanded(mode: Pass, stacks: Sequence[Tensor], stacked: Sequence[bool]) -> list[Tensor]:
    """Return all tensors as `[M, ...]`; a shared one is repeated without a copy."""
    return [t if s else t.expand(mode.num_models, *t.shape) for t, s in zip(stacks, stacked, strict=True)]


def as_one_model_sees(stack: Tensor) -> Tensor:
    """Return a tensor `[M, ...]` as each model sees its own of it, inside of vmap."""
    return functorch._add_batch_dim(stack, 0, functorch.maybe_current_level())


def as_stacked(tensor: Tensor) -> Tensor | None:
    """Return a tensor that each model sees its own of as one of `[M, ...]`; None where all see the same."""
    if not functorch.is_batchedtensor(tensor):
        return None
    stack, dim = functorch.get_unwrapped(tensor), functorch.maybe_get_bdim(tensor)
    return stack.movedim(dim, 0) if dim else stack


def stack_alike(tensors: Sequence[Tensor]) -> Tensor:
    """Stack M tensors so that each slice keeps the strides that it has alone.

    Random numbers are filled in memory order, so a layout lost here would give other masks further on.
    """
    first = tensors[0]
    if first.is_contiguous():
        return mark_rows(torch.stack(list(tensors)))
    order, inverse = memory_order(first)
    stacked = mark_rows(torch.stack([t.permute(order) for t in tensors]))
    return stacked.permute(0, *(1 + d for d in inverse))


def memory_order(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Return a tensor's dimensions, outermost in memory first, and at which place among them each one is."""
    order = list(range(tensor.dim()))
    if not tensor.is_contiguous() and tensor.numel():
        order.sort(key=tensor.stride, reverse=True)
    return order, [order.index(d) for d in range(tensor.dim())]
