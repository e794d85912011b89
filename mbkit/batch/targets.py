"""Which targets are one for all models and which are each model's own: told once, and never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..common.objects import flatten, tensors_of, unflatten


class TargetForms:
    """Tells which tensors of the targets are `[B, ...]` for all models and which are `[M, B, ...]`, one for each.

    What it has found for one pair of outputs and targets holds for all that follow, whatever their sizes: a last
    batch of as many rows as there are models is read as the batches before it. So one object goes with a whole run.

    Args:
        shared: True or False to say it for all targets; None to tell it by their shapes.

    Raises:
        TypeError: another value.

    Example:
        >>> import torch
        >>> forms = TargetForms()
        >>> forms.of((torch.zeros(8), torch.zeros(4, 8)), (4, 8, 10), 4)
        (True, False)
        >>> forms.of((torch.zeros(4), torch.zeros(4, 4)), (4, 4, 10), 4)
        (True, False)
    """

    def __init__(self, shared: bool | None = None) -> None:
        if shared is not None and not isinstance(shared, bool):
            raise TypeError(f"Expected shared_targets True, False or None, got {shared!r}: choose one of them.")
        self._shared, self._found = shared, None

    @staticmethod
    def made_of(shared: bool | TargetForms | None) -> TargetForms:
        """Return an object made from what a user said; one that is given is the one to go on with."""
        return shared if isinstance(shared, TargetForms) else TargetForms(shared)

    def of(self, targets: Any, outputs: Sequence[int], num_models: int) -> tuple[bool, ...]:
        """Return for each tensor of the targets whether it is one for all models.

        Args:
            targets: nested tensors `[B, ...]` or `[M, B, ...]`.
            outputs: the shape `[M, B, ...]` of the models' outputs, of the first where there are several.
            num_models: M.

        Raises:
            ValueError: targets that fit neither form, or both.
        """
        tensors = tensors_of(targets)
        if self._found is None or len(self._found) != len(tensors):
            found = [self._shared if self._shared is not None else _is_shared(t, outputs, num_models) for t in tensors]
            self._found = tuple(found)
        for tensor, shared in zip(tensors, self._found, strict=True):
            if not shared and (tensor.dim() == 0 or tensor.shape[0] != num_models):
                why = "shared_targets=False says" if self._shared is not None else "the first targets were"
                got = f"{list(tensor.shape)} for outputs {list(outputs)}"
                told = f"Expected targets [{num_models}, …], as {why}, got {got}: stack one target per model"
                raise ValueError(f"{told}, or pass shared_targets=True for one for all.")
        return self._found


def targets_at(targets: Any, forms: Sequence[bool], models: int | slice) -> Any:
    """Return the targets of one model, or of several: of what is each model's own its rows, and the rest as it is.

    Args:
        targets: nested tensors `[B, ...]` or `[M, B, ...]`.
        forms: which of the two each of them is, from `TargetForms.of`.
        models: a model's number, or a slice of them.
    """
    leaves, spec = flatten(targets)
    shared = iter(forms)
    return unflatten([t if not isinstance(t, Tensor) or next(shared) else t[models] for t in leaves], spec)


def _is_shared(target: Tensor, outputs: Sequence[int], num_models: int) -> bool:
    """Say whether a target is one for all models, by its shape."""
    size = outputs[1] if len(outputs) > 1 else None  # B; a model's output without dimensions does not tell
    one_for_all = target.dim() == 0 or size in (None, target.shape[0])
    one_each = target.dim() > 0 and target.shape[0] == num_models
    if size is not None:
        one_each = one_each and target.dim() > 1 and target.shape[1] == size
    if one_for_all != one_each:
        return one_for_all
    got = f"{list(target.shape)} for outputs {list(outputs)}"
    if one_for_all:
        told = f"Targets {got} could be one batch for all {num_models} models or one for each"
        raise ValueError(f"{told}: say which with shared_targets=True or shared_targets=False.")
    told = f"Expected targets [{size}, …] for all models or [{num_models}, {size}, …] for each its own, got {got}"
    raise ValueError(f"{told}: pass one of the two forms, or say which by shared_targets=True or False.")
