"""The loss function's own settings: one value for all models, or one per model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import did_you_mean
from ..vmap import PerModel

_LISTS = (list, tuple, range)


class LossSettings:
    """Keyword arguments of a loss function, each one value for all M models or one per model.

    Args:
        given: name to value. A list or tuple holds one number or tensor per model; so does a tensor or numpy array
            whose first dimension is M. Numbers reach the loss function as Python numbers. Anything else is one value
            for all.
        loss_fn: must take these names.
        num_models: M.

    Raises:
        TypeError: something that is not a mapping; per-model values that are neither numbers nor tensors.
        ValueError: a name that `loss_fn` does not take; another number of values than models; a tensor that is trained.

    Example:
        >>> settings = LossSettings({"label_smoothing": [0.0, 0.1]}, nn.functional.cross_entropy, 2)
        >>> settings.of_model(1)
        {'label_smoothing': 0.1}
    """

    def __init__(self, given: Mapping[str, Any] | None, loss_fn: Callable, num_models: int) -> None:
        if not isinstance(given, Mapping | None):
            raise TypeError(f"Expected loss_settings as a dict of names and values, got {given!r}: pass one.")
        self.values: dict[str, Any] = {}
        self.rows: set[str] = set()  # the names of tensors `[M, ...]` with a row per model
        self._told_by_shape: dict[str, int] = {}  # the names of tensors of which only M tells that, and M
        for name, value in (given or {}).items():
            _check_name(name, loss_fn)
            if isinstance(value, Tensor) and value.requires_grad:
                told = f"Expected loss_settings without parameters, got a tensor that is trained as {name!r}"
                raise ValueError(f"{told}: make it a part of each model, and let forward return it beside the outputs.")
            if not isinstance(value, Tensor) and getattr(value, "ndim", 0) > 0:
                value = torch.as_tensor(value)  # numpy's
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_models:
                self._told_by_shape[name] = num_models
                value = value.tolist() if value.dim() == 1 else list(value)
            self.values[name] = self._per_model(name, value, num_models) if isinstance(value, _LISTS) else value

    @staticmethod
    def made_of(given: Mapping[str, Any] | LossSettings | None, loss_fn: Callable, num_models: int) -> LossSettings:
        """Return an object made from what a user said; one that is given is the one to go on with."""
        return given if isinstance(given, LossSettings) else LossSettings(given, loss_fn, num_models)

    @property
    def differ(self) -> bool:
        """Whether some Python number differs between the models."""
        return any(isinstance(value, PerModel) for value in self.values.values())

    def of_model(self, m: int | slice) -> dict[str, Any]:
        """Return model m's keyword arguments; of several models tuples of numbers, and rows of tensors."""
        return {
            name: value.values[m] if isinstance(value, PerModel) else value[m] if name in self.rows else value
            for name, value in self.values.items()
        }

    def of_models(self, models: slice) -> LossSettings:
        """Return the settings of a part of the models."""
        part = copy.copy(self)
        part.values = {n: PerModel(v) if isinstance(v, tuple) else v for n, v in self.of_model(models).items()}
        return part

    def check_outputs(self, shape: torch.Size) -> None:
        """Refuse a tensor that is told to be per model by its first dimension only, where outputs have M classes.

        Args:
            shape: `[M, B, ...]` of the models' outputs.

        Raises:
            ValueError: there is one.
        """
        for name, num_models in self._told_by_shape.items():
            if num_models in shape[2:]:
                told = f"The tensor {name!r} in loss_settings, of first dimension {num_models}, could be one value for"
                told += f" all models or one per model, for outputs {list(shape)}: pass list(tensor) for one per model"
                raise ValueError(f"{told}, or [tensor] * {num_models} for one for all.")

    def _per_model(self, name: str, values: Sequence, num_models: int) -> Any:
        if len(values) != num_models:
            told = f"Expected {num_models} values (one per model) as {name!r} in loss_settings, got {len(values)}"
            raise ValueError(f"{told}: pass one value for all models, or a list of {num_models}.")
        if all(isinstance(value, Tensor) for value in values):
            self.rows.add(name)
            return torch.stack(list(values))
        values = [value.item() if hasattr(value, "item") else value for value in values]  # numpy's and torch's
        if not all(isinstance(value, int | float) for value in values):
            told = f"Expected numbers or tensors as {name!r} in loss_settings, got {values!r}"
            raise TypeError(f"{told}: one value per model can only be a number or a tensor.")
        return values[0] if all(type(v) is type(values[0]) and v == values[0] for v in values) else PerModel(values)


def _check_name(name: Any, loss_fn: Callable) -> None:
    """Refuse a setting that the loss function does not take, before torch or Python refuses all of them."""
    try:
        parameters = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn).parameters
    except (TypeError, ValueError):  # a function in C, which does not tell
        return
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [n for n, p in list(parameters.items())[2:] if p.kind in by_keyword]
    if name not in names and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        kind = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        takes = did_you_mean(str(name), names) if names else " It takes none."
        raise ValueError(f"Expected settings that the loss function {kind} takes by name, got {name!r}.{takes}")
