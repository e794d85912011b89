"""Objects and dicts that differ between the models, such as their configurations, read as if they were one.

A setting that merely stands there may differ. What a call reads is one value where all models have the same, and a
`PerModel` where they have numbers of their own; anything else raises, and the layer that reads it runs model by model.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import BatchingError
from .per_model import PerModel, agreed

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_OPENED = (dict, list)


class Differing:
    """M objects of one class, or M dicts, as one model sees its own.

    Args:
        values: M of them.
        name: under which name they stand, for errors.
    """

    __slots__ = ("_name", "_values")

    def __init__(self, values: Sequence[Any], name: str) -> None:
        object.__setattr__(self, "_values", list(values))
        object.__setattr__(self, "_name", name)

    @property
    def __class__(self) -> type:  # for isinstance
        return type(self._values[0])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        first = getattr(self._values[0], name)
        if isinstance(first, types.MethodType) and first.__self__ is self._values[0]:
            return types.MethodType(first.__func__, self)  # so that what it reads is read here as well
        if isinstance(self._values[0], dict) and hasattr(Mapping, name):
            return types.MethodType(getattr(Mapping, name), self)  # keys, items, get: by what is read here
        return _read([getattr(value, name) for value in self._values], f"{self._name}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, _SIMPLE) or isinstance(value, PerModel):
            raise BatchingError(f"it keeps a value in '{self._name}.{name}', an object that differs between the models")
        for own in self._values:
            setattr(own, name, value)

    def __getitem__(self, key: Any) -> Any:
        return _read([value[key] for value in self._values], f"{self._name}[{key!r}]")

    def __contains__(self, key: Any) -> bool:
        return agreed([key in value for value in self._values], f"whether {key!r} is in '{self._name}'")

    def __len__(self) -> int:
        return agreed([len(value) for value in self._values], f"the length of '{self._name}'")

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._values[0], dict):
            return iter(agreed([list(value) for value in self._values], f"what '{self._name}' holds"))
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return agreed([bool(value) for value in self._values], f"a test of '{self._name}'")

    def __eq__(self, other: Any) -> bool:
        return agreed([value == other for value in self._values], f"a comparison of '{self._name}'")

    __hash__ = None


class Guarded(dict):
    """A module copy's parameters, where torch looks for what is no attribute: to look for a name that differs raises.

    Args:
        parameters: of one model.
        differing: attributes that have another value in each model, by their names.
    """

    def __init__(self, parameters: Mapping[str, Any], differing: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(parameters)
        self._differing = differing

    def __contains__(self, name: Any) -> bool:
        if name in self._differing:
            _read(list(self._differing[name]), name)
        return super().__contains__(name)


def can_be_opened(values: Sequence[Any]) -> bool:
    """Say whether values are objects or dicts of one type, of which single entries can be read."""
    first = values[0]
    is_object = hasattr(first, "__dict__") and not isinstance(first, Tensor) and not callable(first)
    return (is_object or type(first) in _OPENED) and all(type(value) is type(first) for value in values)


def _read(values: list[Any], name: str) -> Any:
    first = values[0]
    if all(value is first for value in values):
        return first
    if all(type(value) is type(first) for value in values):
        if can_be_opened(values):
            return Differing(values, name)
        if type(first) in _SIMPLE and all(value == first for value in values):
            return first
        if isinstance(first, tuple) and len({len(value) for value in values}) == 1:
            parts = [_read(list(column), name) for column in zip(*values, strict=True)]
            return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if {type(value) for value in values} in ({float}, {float, int}):
        return PerModel(values)
    m = next(m for m, value in enumerate(values) if value is not first and (type(value), value) != (type(first), first))
    raise BatchingError(f"it reads '{name}', which is {first!r} for model 0 and {values[m]!r} for model {m}")
