"""M models' hyperparameters: plain numbers for users and schedulers, columns `[M]` for the update rules."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .each import Each

OptimizerClass = type[torch.optim.Optimizer]
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
    """One model's entry of `param_groups`, a dict of plain numbers, which notes which of its names were written.

    It is copied and pickled as a plain dict, because a copy belongs to no optimizer yet.

    Args:
        items: the hyperparameters, and "params".
        changed: the set of names that all groups of one optimizer share.
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


class ModelGroups(list):
    """`param_groups` of M models, which says what a scheduler does that is made for one model and sees all.

    Args:
        groups: of all models. num_models: M.
    """

    def __init__(self, groups: Iterable[ModelGroup], num_models: int) -> None:
        super().__init__(groups)
        self._num_models = num_models

    def __len__(self) -> int:
        reader = sys._getframe(1)
        if self._num_models > 1 and isinstance(reader.f_locals.get("self"), ReduceLROnPlateau):
            told = f"ReduceLROnPlateau gets one number and lowers the rates of all {self._num_models} models together."
            told += " OptimizerFactory.create_lr_scheduler(optimizer, ReduceLROnPlateau, {...}) makes one for each"
            warnings.warn(f"{told}, and its step(losses) takes the M losses.", stacklevel=3)
        return super().__len__()


class Columns:
    """The groups' numbers as float64 tensors `[M]` (`[M, k]` for a tuple of k), rebuilt only when one was written.

    Reading them costs the same for 10 models as for 10,000.

    Args:
        groups: M dicts that hold at least `names`.
        names: the hyperparameters that the update rule reads.
        common: those of them that are one value for all models.
        with_none: those of them that are tuples in which None may stand; in the tensor it is NaN.

    Attributes:
        flags: for each name True or False where all models agree on whether it is nonzero, else None; for a common
            one its value.
        fused: False if a model is not to have torch's fused kernel, True if all are to have it, else None.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], names: Iterable[str], common: Iterable[str], with_none: Iterable[str]
    ) -> None:
        self.names, self._common, self._with_none = tuple(names), tuple(common), tuple(with_none)
        self.changed = {*self.names, "fused"}
        self.groups = [ModelGroup(group, self.changed) for group in groups]
        self.flags: dict[str, Any] = {}
        self.fused: bool | None = None
        self._values: dict[str, Tensor] = {}
        self._devices: dict[torch.device, dict[str, Tensor]] = {}
        self._ready: dict[Any, Hyperparameters] = {}

    def refresh(self) -> None:
        """Take over what was written into the groups since the last call."""
        if not self.changed:
            return
        for name in filter(self.changed.__contains__, self.names):  # in one order, by which a compiled step is found
            values = [group[name] for group in self.groups]
            if name in self._common:
                self.flags[name] = _agreed(name, values)
                continue
            if name in self._with_none:
                values = [tuple(math.nan if part is None else part for part in value) for value in values]
            self._values[name] = _to_column(name, values)
            self.flags[name] = True if all(values) else None if any(values) else False
            for device, columns in self._devices.items():
                column = _move(self._values[name], device)
                stays = name in columns and columns[name].shape == column.shape  # where a replayed step reads it
                columns[name] = columns[name].copy_(column) if stays else column
        if "fused" in self.changed:
            given = {group.get("fused") for group in self.groups}
            self.fused = given.pop() if len(given) == 1 else False if False in given else None
        self._ready.clear()
        self.changed.clear()

    def on(self, name: str) -> Any:
        """Return True or False where all models agree on whether `name` is nonzero, else None; or the common value."""
        return self.flags[name]

    def at(self, params: list[Tensor], rows: slice = ALL) -> Hyperparameters:
        """Return the columns of some models on the parameters' device, ready to be spread over their parameters."""
        device = params[0].device
        key = (device, params[0].dtype, rows.start, rows.stop, *(p.shape for p in params))
        if key not in self._ready:
            if device not in self._devices:
                self._devices[device] = {name: _move(column, device) for name, column in self._values.items()}
            columns = self._devices[device]
            columns = columns if rows == ALL else {name: column[rows] for name, column in columns.items()}
            self._ready[key] = Hyperparameters(columns, self.flags, params)
        return self._ready[key]


class Hyperparameters:
    """What an update rule sees: columns by name, and the way to bring a column to each parameter's shape.

    Args:
        columns: tensors `[M]` by name, in float64 as torch.optim's own Python numbers are.
        flags: as in `Columns`.
        params: P real tensors `[M, ...]` of one dtype.
    """

    def __init__(self, columns: dict[str, Tensor], flags: dict[str, Any], params: list[Tensor]) -> None:
        self.columns, self.flags = columns, flags
        self._dims = [p.dim() for p in params]
        # torch rounds a Python number to float32 even where the parameters are shorter.
        self._dtype = torch.promote_types(params[0].dtype, torch.float32)
        self._kept: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def on(self, name: str) -> Any:
        """Return whether `name` is nonzero: one bool where all models agree (no work at all), else a tensor `[M]`."""
        agreed = self.flags[name]
        return self.columns[name] != 0 if agreed is None else agreed

    def kept(self, what: str, make: Callable[[], Any]) -> Any:
        """Return what `make` does, which is called anew only when a hyperparameter was written."""
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]

    def once(self, what: str, make: Callable[[], Sequence[bool | Tensor]]) -> list[bool | Each]:
        """Return for each of some columns what `spread` does; `kept`."""
        return self.kept(what, lambda: [self.spread(column) for column in make()])

    def spread(self, column: bool | Tensor) -> bool | Each:
        """Return the column for each of the P parameters, rounded once to their dtype.

        Args:
            column: `[M]` or `[1, M]`, the same for all parameters, or `[P, M]`, one row for each; or one bool for all.

        Returns:
            P tensors `[M, 1, ...]`, each with as many dimensions as its parameter (or the bool).
        """
        if isinstance(column, bool):
            return column
        if column.dtype != torch.bool:
            column = column.to(self._dtype)
        if column.dim() == 1 or len(column) == 1:
            made = {dim: column.view(-1, *[1] * (dim - 1)) for dim in set(self._dims)}
            return Each(made[dim] for dim in self._dims)
        rows = column.unbind(0)
        return Each(row.view(-1, *[1] * (dim - 1)) for row, dim in zip(rows, self._dims, strict=True))


def _agreed(name: str, values: list[Any]) -> Any:
    for m, value in enumerate(values):
        if value != values[0]:
            told = f"Expected one {name!r} for all models, got {values[0]!r} and {value!r} for model {m}"
            raise ValueError(f"{told}: give them to create_optimizer, which then updates one model after the other.")
    return values[0]


def _to_column(name: str, values: list[Any]) -> Tensor:
    try:
        return torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        forms = [_form(value) for value in values]
        # Model 0 may be the odd one out; then a later one differs from it, and both are shown.
        odd = next((m for m, form in enumerate(forms) if form is None or form != forms[0]), 0)
        told = f"Expected numbers of one form as {name!r} of all models, got {values[odd]!r} for model {odd}"
        raise TypeError(f"{told} and {values[0]!r} for model 0: write a number, or tuples of one length.") from None


def _form(value: Any) -> int | None:
    """Return the length of a tuple of numbers, -1 for one number, None for anything else."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, (int, float)) for part in parts):
        return None
    return len(value) if isinstance(value, tuple) else -1


def _move(column: Tensor, device: torch.device) -> Tensor:
    return column.to(device, torch.float32 if device.type == "mps" else column.dtype)  # MPS has no float64
