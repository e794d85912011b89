"""M models' hyperparameters: plain numbers for users and schedulers, columns `[M]` for the update rules."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["ALL", "SWITCHES", "Columns", "Hyperparameters", "ModelGroup", "cut", "numbers_of", "plain"]

SWITCHES = ("foreach", "fused", "capturable", "differentiable")
"""Arguments of torch.optim's classes that choose an implementation, not an update."""

ALL = slice(None)
"""All models' rows of a tensor."""


def cut(tensors: list[Tensor], rows: slice) -> list[Tensor]:
    """Return some models' rows of each tensor; the tensors themselves, at no cost, for ALL."""
    return tensors if rows == ALL else [tensor[rows] for tensor in tensors]


def plain(value: Any) -> Any:
    """Return `value` as what a param_groups entry holds: a number instead of a tensor, a tuple instead of a list.

    Both can be changed in place, unseen, where a number or a tuple has to be written anew.
    """
    if hasattr(value, "tolist"):  # torch and numpy
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value


def numbers_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group's hyperparameters, all but its parameters."""
    return {name: value for name, value in group.items() if name != "params"}


class ModelGroup(MutableMapping, dict):
    """One model's entry of `param_groups`: a dict of plain numbers that notes which of its names were written.

    Args:
        items: the hyperparameters, and "params".
        changed: the set of names that all groups of one optimizer share.

    Every way to write into a dict goes through the two methods below. It is copied and pickled as a plain dict, because
    a copy belongs to no optimizer yet.
    """

    __slots__ = ("_changed",)
    __getitem__, __iter__, __len__, __contains__ = dict.__getitem__, dict.__iter__, dict.__len__, dict.__contains__

    def __init__(self, items: dict[str, Any], changed: set[str]) -> None:
        self._changed = changed
        self.update(items)

    def __setitem__(self, name: str, value: Any) -> None:
        self._changed.add(name)
        dict.__setitem__(self, name, value if name == "params" else plain(value))

    def __delitem__(self, name: str) -> None:
        self._changed.add(name)
        dict.__delitem__(self, name)

    def __ior__(self, other: Any) -> ModelGroup:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[dict]]:
        return dict, (dict(self),)


class Columns:
    """The groups' numbers as float64 tensors `[M]` (`[M, k]` for a tuple of k), rebuilt only when one was written.

    Reading them costs the same for 10 models as for 10,000.

    Args:
        groups: M dicts that hold at least `names`.
        names: the hyperparameters that the update rule reads.

    Attributes:
        flags: for each name True or False where all models agree on whether it is nonzero, else None.
        fused: False if a model is not to have torch's fused kernel, True if all are to have it, else None.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.changed = {*self.names, "fused"}
        self.fused: bool | None = None
        self.groups = [ModelGroup(group, self.changed) for group in groups]
        self.flags: dict[str, bool | None] = {}
        self._values: dict[str, Tensor] = {}
        self._devices: dict[torch.device, dict[str, Tensor]] = {}

    def refresh(self) -> None:
        """Take over what was written into the groups since the last call."""
        for name in self.changed.intersection(self.names):
            values = [group[name] for group in self.groups]
            self._values[name] = _to_column(name, values)
            self.flags[name] = True if all(values) else None if any(values) else False
            for device, columns in self._devices.items():
                columns[name] = _move(self._values[name], device)
        if "fused" in self.changed:
            given = {group.get("fused") for group in self.groups}
            self.fused = given.pop() if len(given) == 1 else False if False in given else None
        self.changed.clear()

    def on(self, name: str) -> bool | None:
        """Return True or False where all models agree on whether `name` is nonzero, else None."""
        return self.flags[name]

    def at(self, params: list[Tensor], rows: slice = ALL) -> Hyperparameters:
        """Return the columns of some models on the parameters' device, ready to be spread over their parameters."""
        device = params[0].device
        if device not in self._devices:
            self._devices[device] = {name: _move(column, device) for name, column in self._values.items()}
        columns = self._devices[device]
        columns = columns if rows == ALL else {name: column[rows] for name, column in columns.items()}
        return Hyperparameters(columns, self.flags, params)


class Hyperparameters:
    """What an update rule sees: columns by name, and the way to bring a column to each parameter's shape.

    Args:
        columns: tensors `[M]` by name, in float64 as torch.optim's own Python numbers are.
        flags: by name, True or False where all models agree on whether it is nonzero, else None.
        params: P real tensors `[M, ...]` of one dtype.
    """

    def __init__(self, columns: dict[str, Tensor], flags: dict[str, bool | None], params: list[Tensor]) -> None:
        self.columns, self.flags, self.params = columns, flags, params
        # torch rounds a Python number to float32 even where the parameters are shorter.
        self._dtype = torch.promote_types(params[0].dtype, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def on(self, name: str) -> bool | Tensor:
        """Return whether `name` is nonzero: one bool where all models agree (no work at all), else a tensor `[M]`."""
        agreed = self.flags[name]
        return self.columns[name] != 0 if agreed is None else agreed

    def spread(self, column: bool | Tensor) -> list[Any]:
        """Return the column for each of the P parameters, rounded once to their dtype.

        Args:
            column: `[M]`, the same for all parameters, or `[P, M]`, one row per parameter; or one bool for all.

        Returns:
            P tensors `[M, 1, ...]`, each with as many dimensions as its parameter (or P times the bool).
        """
        if isinstance(column, bool):
            return [column] * len(self.params)
        if column.dtype != torch.bool:
            column = column.to(self._dtype)
        if column.dim() == 2:
            return [row.view(-1, *[1] * (p.dim() - 1)) for row, p in zip(column.unbind(0), self.params, strict=True)]
        views = {dim: column.view(-1, *[1] * (dim - 1)) for dim in {p.dim() for p in self.params}}
        return [views[p.dim()] for p in self.params]


def _to_column(name: str, values: list[Any]) -> Tensor:
    try:
        return torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        forms = [_form(value) for value in values]
        # Model 0 may be the odd one out; then a later one differs from it, and both are shown.
        odd = next((m for m, form in enumerate(forms) if form is None or form != forms[0]), 0)
        raise TypeError(
            f"Expected numbers of one form as {name!r} of all models, got {values[odd]!r} for model {odd} "
            f"(model 0 has {values[0]!r}, {type(values[0]).__name__}): write a number, or tuples of one length."
        ) from None


def _form(value: Any) -> int | None:
    """Return the length of a tuple of numbers, -1 for one number, None for anything else."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, (int, float)) for part in parts):
        return None
    return len(value) if isinstance(value, tuple) else -1


def _move(column: Tensor, device: torch.device) -> Tensor:
    return column.to(device, torch.float32 if device.type == "mps" else column.dtype)  # MPS has no float64
