"""A number that has another value for each model: a dropout rate, BatchNorm's momentum, a setting of a loss."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from .errors import BatchingError


def agreed(values: Sequence[Any], what: str) -> Any:
    """Return the value that all M models have, or raise, because one Python value cannot stand for several.

    Example:
        >>> agreed([2, 2, 2], "the number of steps")
        2
    """
    first = values[0]
    for m, value in enumerate(values):
        if value != first:
            raise BatchingError(
                f"{what} has to be one Python value, but the models disagree: {first!r} for model 0, "
                f"{value!r} for model {m}"
            )
    return first


class PerModel:
    """M Python numbers that travel through a model as if they were one.

    Arithmetic works on all of them and comparisons need all models to agree. It passes for a float, but is none: torch
    hands it to the rules, and whatever else would read it as one number raises.

    Args:
        values: M numbers; an operator that runs for one model after the other gets them as they are.

    Example:
        >>> rates = PerModel([0.25, 0.5])
        >>> (1 - rates).values
        (0.75, 0.5)
        >>> rates > 0
        True
    """

    __slots__ = ("values",)
    __class__ = property(lambda self: float)  # for isinstance

    def __init__(self, values: Sequence[float]) -> None:
        self.values = tuple(values)

    def __reduce__(self):
        return PerModel, (self.values,)

    def __deepcopy__(self, memo):
        return self

    def __repr__(self) -> str:
        return f"PerModel({list(self.values)})"

    def __float__(self) -> float:
        return float(agreed(self.values, "a setting that differs between the models"))

    def __bool__(self) -> bool:
        return agreed([bool(v) for v in self.values], "a test of a setting")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", function)
        raise BatchingError(f"{name} gets a number that differs between the models, where none can be told apart")

    __hash__ = None  # equal to a number for no model in particular, so no key for a dict


def _lifted(function: Callable) -> Callable:
    def method(self: PerModel, other: Any = 0.0) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        others = other.values if isinstance(other, PerModel) else [other] * len(self.values)
        results = [function(a, b) for a, b in zip(self.values, others, strict=True)]
        return agreed(results, "a comparison of settings") if isinstance(results[0], bool) else PerModel(results)

    return method


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(PerModel, f"__{_name}__", _lifted(getattr(operator, _name)))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _own = getattr(operator, _name)
    setattr(PerModel, f"__{_name}__", _lifted(_own))
    setattr(PerModel, f"__r{_name}__", _lifted(lambda a, b, own=_own: own(b, a)))
PerModel.__neg__ = _lifted(lambda a, _: operator.neg(a))
PerModel.__abs__ = _lifted(lambda a, _: abs(a))
