"""From the batched tensors that a model sees under vmap to the stacked tensors in memory, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from .errors import BatchingError
from .gradients import mark_rows
from .registry import Pass

SHARED = "mbkit_shared"  # in a node's metadata: the tensor that all models share and that the node lays out in rows


@contextmanager
def below(mode: Pass) -> Iterator[None]:
    """Leave vmap for a `with` block, and the transforms of torch.func in the model that are on above it."""
    with ExitStack() as stack:
        while (functorch.maybe_current_level() or 0) >= mode.level:
            stack.enter_context(temporarily_pop_interpreter_stack())
        yield


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
            "what runs model by model is called inside torch.func (grad, vmap, …) in the model, where the models' "
            "tensors cannot be taken apart: name the layer around that in ModelBatch(..., model_by_model=[…])"
        )
    tensors = [own_rows(mode, t) for t in tensors]
    stacks = [as_stacked(t) for t in tensors]
    stacked = [t is not None for t in stacks]
    stacks = [t if stack is None else stack for t, stack in zip(tensors, stacks, strict=True)]
    popped = functorch.pop_dynamic_layer_stack()  # random numbers may be drawn below vmap
    try:
        result = function(stacks, stacked)
    finally:
        functorch.push_dynamic_layer_stack(popped)
    if isinstance(result, Tensor):
        return functorch._add_batch_dim(result, 0, mode.level)
    return tuple(functorch._add_batch_dim(t, 0, mode.level) for t in result) if isinstance(result, tuple) else result


def expanded(mode: Pass, stacks: Sequence[Tensor], stacked: Sequence[bool]) -> list[Tensor]:
    """Return all tensors as `[M, ...]`; a shared one is repeated without a copy."""
    return [t if s else t.expand(mode.num_models, *t.shape) for t, s in zip(stacks, stacked, strict=True)]


def given_to_models(mode: Pass, tensor: Tensor, shared: bool) -> Tensor:
    """Return what one model sees of a tensor: of a shared one that requires gradients rows of its own, without a copy.

    Args:
        tensor: `[M, ...]`, or what all models share.
    """
    if shared and not (tensor.requires_grad and tensor.layout is torch.strided):
        return tensor
    if shared:
        whole = tensor
        with torch.enable_grad():  # the model may switch it on later
            tensor = whole.expand(mode.num_models, *whole.shape)
        tensor.grad_fn.metadata[SHARED] = whole
    return functorch._add_batch_dim(tensor, 0, mode.level)


def own_rows(mode: Pass, tensor: Tensor) -> Tensor:
    """Return the rows of a shared tensor that requires gradients, as one model sees its own; any other as it is."""
    wrapped = functorch.is_batchedtensor(tensor) or functorch.is_gradtrackingtensor(tensor)
    if not mode.own_rows or wrapped or not tensor.requires_grad:
        return tensor
    if id(tensor) not in mode.laid_out and functorch.maybe_current_level() == mode.level:
        mode.laid_out[id(tensor)] = tensor, given_to_models(mode, tensor, shared=True)
    return mode.laid_out.get(id(tensor), (tensor, tensor))[1]


def as_one_model_sees(stack: Tensor, level: int | None = None) -> Tensor:
    """Return a tensor `[M, ...]` as each model sees its own of it, inside of vmap, of which the level may be given."""
    return functorch._add_batch_dim(stack, 0, functorch.maybe_current_level() if level is None else level)


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
