"""Stopping single models of a batch: whatever is called, nothing of theirs changes, and the others do not notice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..common.checks import model_numbers
from ..vmap import BatchingError, PerModelValue, State, write_state
from .context import CallContext, context_of


class CanFreeze:
    """The part of a ModelBatch that stops single models."""

    num_models: int

    @property
    def frozen(self) -> list[int]:
        """The numbers of the models that are frozen; to read it waits for the device."""
        context = context_of(self)
        numbers = [] if context.frozen is None else context.frozen.nonzero().flatten().tolist()
        if not numbers:
            context.frozen = None  # `stop_nonfinite` leaves a mask of nobody on a device for which it does not wait
        return numbers

    def freeze(self, models: int | Iterable[int]) -> None:
        """Stop models: until `unfreeze`, nothing of theirs changes, and the others train on to the same bits.

        A frozen model has what a lone model has that is no longer trained: its parameters, buffers, random stream
        and its share of the optimizer's state stay as they are, whatever is called. It still computes outputs and
        losses. Its learning rate goes on as its scheduler says. A gradient that waits for `optimizer.step()` is not
        applied. The update is the optimizer's work, so it has to be one from `OptimizerFactory`. A run with
        `compile=True` goes on uncompiled while a model is frozen, which can change the others' last bits.

        Args:
            models: a model's number, or several.

        Raises:
            TypeError: models that are not whole numbers.
            IndexError: there is no such model.

        Example:
            >>> from torch import nn
            >>> from mbkit import ModelBatch
            >>> batch = ModelBatch([nn.Linear(2, 1) for _ in range(3)])
            >>> batch.freeze(1)
            >>> batch.freeze([2])
            >>> batch.frozen
            [1, 2]
            >>> batch.unfreeze(range(3))
            >>> batch.frozen
            []
        """
        context_of(self).frozen = _changed(context_of(self), models, True)

    def unfreeze(self, models: int | Iterable[int]) -> None:
        """Let frozen models train on from where they stopped; arguments and errors as for `freeze`."""
        context_of(self).frozen = _changed(context_of(self), models, False)


def _changed(context: CallContext, models: int | Iterable[int], frozen: bool) -> Tensor | None:
    """Return which models are frozen once `models` are (or no longer are): `[M]`, or None for none."""
    numbers = model_numbers(models, context.num_models)
    mask = torch.zeros(context.num_models, dtype=torch.bool) if context.frozen is None else context.frozen.clone()
    mask[numbers] = frozen
    return mask if mask.any() else None


def rows_where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return `yes` for the models of a mask `[M]` and `no` for the others; both are `[M, ...]`."""
    return torch.where(mask.to(yes.device).view(-1, *[1] * (yes.dim() - 1)), yes, no)


def held(context: CallContext) -> AbstractContextManager:
    """Run a call of the models, and put back what it changed of frozen models: tensors, attributes, random streams.

    Raises:
        BatchingError: the call changed something that is one Python value for all models.
    """
    return nullcontext() if context.frozen is None else _held(context, context.frozen)


@contextmanager
def _held(context: CallContext, frozen: Tensor) -> Iterator[None]:
    template = context.template
    streams, before = context.streams.remember(), State(template)
    own = set(map(id, (*context.attributes, *template.parameters(), *template.buffers())))
    copies = {id(t): (t, t.detach().clone()) for t in before.tensors if id(t) in own}
    replaced: dict[int, Tensor] = {}

    def mixed(was: Any, now: Any) -> Any:
        """Return a value after the call, with the frozen models' share as it was before."""
        if was is now or (not isinstance(now, Tensor | PerModelValue) and was == now):
            return now
        if isinstance(now, PerModelValue) or isinstance(was, PerModelValue):
            return PerModelValue.where(frozen.tolist(), was, now)
        if isinstance(now, Tensor) and id(was) in copies and (was.shape, was.dtype) == (now.shape, now.dtype):
            replaced[id(now)] = rows_where(frozen, copies[id(was)][1], now)
            return replaced[id(now)]
        raise ValueError("one value for all models")

    try:
        yield
    finally:  # after an error as well, which leaves with the others what it leaves alone
        if context.streams.in_use:
            streams(frozen.nonzero().flatten().tolist())
        for tensor, copy in copies.values():
            if tensor.shape == copy.shape:
                tensor.data.copy_(rows_where(frozen, copy, tensor.data))
        after = State(template)
        now = dict(after)
        for key, value in after.items():
            if value is not before.get(key):
                try:
                    now[key] = tree_map(mixed, before.get(key), value)
                except ValueError as error:  # also of another structure
                    name = ".".join(filter(None, (key[0], key[2])))
                    told = f"a call changes '{name}', which is one value for all models, so frozen ones cannot keep it"
                    raise BatchingError(f"{told}: make it a buffer of one shape, or unfreeze() them") from error
        write_state(after, now)
        context.attributes = [replaced.get(id(t), t) for t in context.attributes]


def nonfinite_models(tensors: Sequence[Tensor], num_models: int) -> Tensor:
    """Return which models have a number that is not finite in one of the tensors `[M, ...]`; no wait for the device."""
    flags = [~t.isfinite().reshape(num_models, -1).all(1) for t in tensors]
    return torch.stack(flags).any(0) if flags else torch.zeros(num_models, dtype=torch.bool)


def check_on_nonfinite(choice: str | None, optimizer: Any) -> None:
    """Refuse another choice, or to freeze with an optimizer that would go on with momentum and weight decay."""
    if choice == "freeze" and not hasattr(optimizer, "batch"):
        told = f"Expected an optimizer from OptimizerFactory with on_nonfinite='freeze', got {type(optimizer).__name__}"
        raise TypeError(f"{told}, which cannot leave out single models: create one by create_optimizer(batch, ...).")
    if choice not in (None, "freeze", "raise"):
        raise ValueError(f"Expected on_nonfinite None, 'freeze' or 'raise', got {choice!r}: choose one of them.")


def stop_nonfinite(batch: nn.Module, losses: Tensor, choice: str) -> None:
    """Freeze the models whose loss or gradient is not finite, before their update; or raise.

    Where nobody is frozen, nothing is left behind. Only on an accelerator, for which this does not wait, a mask of
    nobody may stay until `batch.frozen` is read.

    Raises:
        FloatingPointError: there are such models among those that train, and `choice` is "raise".
    """
    grads = [p.grad for p in batch.parameters() if p.grad is not None]
    context = context_of(batch)
    bad = nonfinite_models([losses.detach(), *grads], context.num_models)
    bad = bad if context.frozen is None else bad | context.frozen.to(bad.device)
    if choice == "raise":
        known = batch.frozen
        numbers = [m for m, is_bad in enumerate(bad.tolist()) if is_bad and m not in known]
        if numbers:
            told = f"The loss or gradient of models {numbers} is not finite: the batch is as before this update"
            raise FloatingPointError(f"{told}. Go on with smaller learning rates, or with on_nonfinite='freeze'.")
    else:
        context.frozen = None if bad.device.type == "cpu" and not bad.any() else bad
