"""The losses of M models: all at once under torch.vmap, or one after the other where it cannot run them so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..common.checks import cut
from ..common.functions import depth_of_user
from ..common.objects import flatten, tensors_of, unflatten
from ..vmap import BatchingError, PerModel, PerModelValue, SharedInput, mark_rows, watch_backward
from .call import NO_FAULT_OF_VMAP, PLAIN_ERRORS, at_once
from .context import CallContext
from .freeze import held
from .hooks import refuse_late_reader
from .kept import kept_by
from .loss_settings import LossSettings
from .targets import TargetForms


def call_losses(
    context: CallContext,
    outputs: Any,
    targets: Any,
    loss_fn: Callable[..., Tensor],
    forms: TargetForms,
    settings: LossSettings,
) -> Tensor:
    """Return the loss of each model, `[M]`, and keep it, detached, in the context.

    Args:
        context: supplies M and the streams.
        outputs: nested tensors `[M, B, ...]`; inside objects as well.
        targets: nested tensors `[B, ...]` or `[M, B, ...]`.
        loss_fn: from one model's outputs and targets to one number.
        forms: which of the two forms the targets have.
        settings: keyword arguments for `loss_fn`, of these M models.
    """
    made, outputs_spec = flatten(outputs)
    in_dims = _in_dims(made, targets, forms, settings, context.num_models)
    flat = (made, outputs_spec), flatten(targets), flatten(settings.values)
    leaves = [leaf for own, _ in flat for leaf in own]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    known = context.kept
    kept, code = kept_by(context, loss_fn), loss_code(loss_fn)
    if kept is not known:
        refuse_late_reader(context, kept)

    def one_model(mode: Any, *own: Tensor, m: int | None = None) -> tuple[Tensor]:
        remaining = iter(own)
        mine = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if m is not None:
            mine = [leaf.values[m] if type(leaf) in (PerModel, PerModelValue) else leaf for leaf in mine]
        elif any(type(leaf) is PerModelValue for leaf in mine):
            raise BatchingError("the models' outputs hold values that differ and are no numbers")
        remaining = iter(mine)
        my_outputs, my_targets, keywords = (unflatten([next(remaining) for _ in own], spec) for own, spec in flat)
        if mode is None:
            return (one_number(loss_fn(my_outputs, my_targets, **keywords)),)
        with kept.under_vmap():
            return (loss_fn(my_outputs, my_targets, **keywords),)

    with held(context):
        context.streams.meet(code)
        undo, losses, reason = context.streams.remember(), None, ""
        if code not in context.slow_losses:
            try:
                differ = settings.differ or any(type(leaf) is PerModel for leaf in made)
                rules = replace(context, per_model_settings=True) if differ else context
                losses = at_once(rules, one_model, tensors, in_dims)[0].reshape(context.num_models)
            except NO_FAULT_OF_VMAP:
                raise
            except Exception as error:
                undo()
                if isinstance(error, SharedInput) and not context.own_rows:
                    context.own_rows = True
                    return call_losses(context, outputs, targets, loss_fn, forms, settings)
                reason = str(error).strip().split("\n")[0]
        try:
            if losses is None:
                each: list[Tensor] = []
                streams, device = context.streams, tensors[0].device
                with kept.in_parts(context.num_models) as part, streams.take_turns(device, part) as turns:
                    for m in turns:
                        own = [t if dim is None else t[m] for t, dim in zip(tensors, in_dims, strict=True)]
                        each += one_model(None, *own, m=m)
                losses = mark_rows(torch.stack(each))
            kept.refuse_trained(losses, made)
        except Exception as error:
            undo()
            known = type(error) in PLAIN_ERRORS
            raise (type(error)(f"the loss function, for one model: {error}") if known else error) from error
    if reason:
        context.slow_losses.add(code)
        told = f"The loss function runs model by model: torch.vmap cannot run it ({reason})."
        warnings.warn(told, stacklevel=depth_of_user())
    if context.model_by_model or context.slow_losses:  # a gradient may come to some models only
        watch_backward([losses], (), context.num_models)
    context.latest_losses = losses.detach()
    return losses


def loss_code(loss_fn: Callable) -> Any:
    """Return what tells a loss function from others: its code, which a lambda in a loop keeps."""
    return getattr(loss_fn, "__code__", loss_fn)


def _in_dims(
    outputs: list[Any], targets: Any, forms: TargetForms, settings: LossSettings, num_models: int
) -> list[int | None]:
    """Return for each tensor of outputs, targets and settings 0, where it has a row for each model, or None.

    Raises:
        TypeError, ValueError: outputs that are not made of tensors, or not of M models'.
    """
    made = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
    if not made:
        raise TypeError(f"Expected outputs made of tensors, got {cut(repr(outputs))}: pass what the batch returned.")
    for tensor in made:
        if tensor.dim() == 0 or tensor.shape[0] != num_models:
            told = f"Expected outputs [{num_models}, B, …] (one slice per model), got {list(tensor.shape)}"
            raise ValueError(f"{told}: pass what the batch returned, outputs first, then targets.")
        settings.check_outputs(tensor.shape)
    dims = [0 for _ in made] + [None if shared else 0 for shared in forms.of(targets, made[0].shape, num_models)]
    for name, value in settings.values.items():
        dims += [0 if name in settings.rows else None for _ in tensors_of(value)]
    return dims


def one_number(loss: Any) -> Tensor:
    """Return one model's loss as a tensor without dimensions, or refuse what is not a tensor of one number."""
    if not isinstance(loss, Tensor):
        told = f"Expected the loss of a model to be a tensor, got {type(loss).__name__}"
        raise TypeError(f"{told}: return the tensor itself, without item() or float().")
    if loss.numel() != 1:
        raise ValueError(f"Expected one loss a model, got a tensor {list(loss.shape)}: let loss_fn average its batch.")
    return loss.reshape(())
