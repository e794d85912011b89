"""One call of M models, or of M losses: torch.vmap under the interception, with errors that name the layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..vmap import mark_rows, watch
from .call import NO_FAULT_OF_VMAP, PLAIN_ERRORS, at_once
from .context import CallContext
from .freeze import held

__all__ = ["call_losses", "loss_code", "one_loss", "targets_of_models"]


def call_losses(
    context: CallContext, outputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Tensor], shared_targets: bool | None
) -> Tensor:
    """Return the loss of each model, `[M]`, and keep it, detached, in the context.

    Args:
        context: supplies M and the streams.
        outputs: nested tensors `[M, B, ...]`.
        targets: nested tensors `[B, ...]` or `[M, B, ...]`.
        loss_fn: from one model's outputs and targets to one number.
        shared_targets: which of the two forms the targets have; None to tell by their shapes.
    """
    with held(context):
        losses = _losses(context, outputs, targets, loss_fn, shared_targets)
    context.latest_losses = losses.detach()
    return losses


def _losses(
    context: CallContext, outputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Tensor], shared_targets: bool | None
) -> Tensor:
    output_leaves, output_spec = tree_flatten(outputs)
    target_leaves, target_spec = tree_flatten(targets)
    for leaf in output_leaves:
        if isinstance(leaf, Tensor):
            _check_outputs(leaf, context.num_models)
    tensors = [leaf for leaf in (*output_leaves, *target_leaves) if isinstance(leaf, Tensor)]
    reference = next((leaf for leaf in output_leaves if isinstance(leaf, Tensor)), None)
    if reference is None:
        raise TypeError(
            f"Expected outputs made of tensors, got {type(outputs).__name__}: pass what the batch returned."
        )
    in_dims = [0 for leaf in output_leaves if isinstance(leaf, Tensor)]
    in_dims += [
        _target_dim(leaf, reference.shape, context.num_models, shared_targets)
        for leaf in target_leaves
        if isinstance(leaf, Tensor)
    ]

    def one_model(mode: Any, *own: Tensor) -> tuple[Tensor]:
        remaining = iter(own)
        leaves = [next(remaining) if isinstance(v, Tensor) else v for v in (*output_leaves, *target_leaves)]
        count = len(output_leaves)
        outputs, targets = tree_unflatten(leaves[:count], output_spec), tree_unflatten(leaves[count:], target_spec)
        return (one_loss(loss_fn, outputs, targets),)

    slow, undo = loss_code(loss_fn), context.streams.remember()
    if slow not in context.slow_losses:
        try:
            losses = at_once(context, one_model, tensors, in_dims)[0]
            if context.model_by_model or context.slow_losses:  # another may have come to some models only
                watch([losses], context.num_models)
            return losses
        except NO_FAULT_OF_VMAP:
            raise
        except Exception as error:
            undo()
            reason = str(error).strip().split("\n")[0]
    else:
        reason = ""
    losses = []
    try:
        with context.streams.take_turns(tensors[0].device) as turns:
            for m in turns:
                own = [t if dim is None else t[m] for t, dim in zip(tensors, in_dims, strict=True)]
                losses += one_model(None, *own)
    except Exception as error:
        undo()
        known = type(error) in PLAIN_ERRORS
        raise (type(error)(f"the loss function, for one model: {error}") if known else error) from error
    if reason:
        context.slow_losses.add(slow)
        warnings.warn(f"The loss function runs model by model: torch.vmap cannot run it ({reason}).", stacklevel=4)
    stacked = mark_rows(torch.stack(losses))
    watch([stacked], context.num_models)
    return stacked


def one_loss(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> Tensor:
    """Return one model's loss as a tensor without dimensions.

    Raises:
        TypeError, ValueError: what loss_fn returns is no tensor, or not one number.
    """
    loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"Expected the loss of a model to be a tensor, got {type(loss).__name__}: "
            "return the tensor itself, without item() or float()."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"Expected one loss a model, got a tensor {list(loss.shape)}: let loss_fn average or add up its batch."
        )
    return loss.reshape(())


def loss_code(loss_fn: Callable) -> Any:
    """Return what tells a loss function from others: its code, which a lambda in a loop keeps."""
    return getattr(loss_fn, "__code__", loss_fn)


def targets_of_models(
    targets: Any, outputs: torch.Size | None, num_models: int, start: int, stop: int, shared: bool | None
) -> tuple[Any, bool]:
    """Return the targets of models start to stop - 1, and whether these are one for all of them.

    Args:
        targets: nested tensors `[B, ...]` or `[M, B, ...]`.
        outputs: the shape `[B, ...]` of one model's output, of the first where there are several; None for none.
        num_models: M.
        start, stop: which models.
        shared: which of the two forms the targets have; None to tell by their shapes.
    """
    if outputs is None:
        return targets, True  # compute_loss says what is wrong
    leaves, spec = tree_flatten(targets)
    shape = torch.Size((num_models, *outputs))
    each = {id(t): _target_dim(t, shape, num_models, shared) == 0 for t in leaves if isinstance(t, Tensor)}

    def own(target: Any) -> Any:
        if not isinstance(target, Tensor):
            return target
        return target[start:stop] if each[id(target)] else target.expand(stop - start, *target.shape)

    return (tree_unflatten(list(map(own, leaves)), spec), False) if any(each.values()) else (targets, True)


def _check_outputs(tensor: Tensor, num_models: int) -> None:
    if tensor.dim() == 0 or tensor.shape[0] != num_models:
        raise ValueError(
            f"Expected outputs [{num_models}, B, …] (one slice per model), got {list(tensor.shape)}: "
            "pass what the batch returned, outputs first, then targets."
        )


def _target_dim(target: Tensor, outputs: torch.Size, num_models: int, shared: bool | None) -> int | None:
    """Return vmap's in_dim of a target: None where all models share it, 0 where each has its own."""
    if shared:
        return None
    leads = target.dim() > 0 and target.shape[0] == num_models
    got = f"got {list(target.shape)} for outputs {list(outputs)}"
    if shared is not None:
        if not leads:
            raise ValueError(f"Expected targets [{num_models}, …], as shared_targets=False says, {got}.")
        return 0
    size = outputs[1] if len(outputs) > 1 else None
    one_for_all = target.dim() == 0 or size in (None, target.shape[0])
    one_a_model = leads and (size is None or (target.dim() > 1 and target.shape[1] == size))
    if not one_for_all and not one_a_model:
        raise ValueError(
            f"Expected targets [{size}, …] for all models or [{num_models}, {size}, …] for each its own, {got}: "
            "pass one of the two forms, or say with shared_targets=True or shared_targets=False how to read them."
        )
    # A target for all has no dimension M, so one of as many dimensions as the outputs has one slice a model.
    if one_for_all and one_a_model and target.dim() != len(outputs):
        raise ValueError(
            f"Targets {list(target.shape)} for outputs {list(outputs)} could be one batch for all models or one "
            "a model: say which with shared_targets=True or shared_targets=False."
        )
    return 0 if one_a_model else None
