"""Objects in plain attributes that all models share, such as a configuration, and what calls note in them.

Alone, each model has its own, so models that are called one after the other, or in chunks, each have to find them as
they were before the first.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .errors import BatchingError
from .state import PLAIN, PerModelValue

__all__ = ["SharedObjects", "is_object"]

_NEW = object()
_OTHERS = (
    Tensor,
    nn.Module,
    type,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.ModuleType,
    PerModelValue,
)


def is_object(leaf: Any) -> bool:
    """Say whether a value is an object that calls may note something in."""
    return hasattr(leaf, "__dict__") and not isinstance(leaf, _OTHERS)


class SharedObjects:
    """Objects that all models share, as they were before a call of some of the models."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Any, dict[str, Any]]] = {}

    def note(self, leaves: Iterable[Any]) -> None:
        """Note the objects among some leaves as they are now."""
        for leaf in leaves:
            if is_object(leaf):
                self._before.setdefault(id(leaf), (leaf, dict(vars(leaf))))

    def take_back(self) -> dict[int, tuple[Any, dict[str, Any]]]:
        """Put the objects back as they were; return the numbers and texts that have been assigned in them.

        Returns:
            By the objects' ids: the object, and the names and values. Anything else stays in it.
        """
        assigned = {}
        for place, (found, before) in self._before.items():
            mine = vars(found)
            new = {name: value for name, value in mine.items() if value is not before.get(name, _NEW)}
            if new and mine.keys() >= before.keys() and all(type(value) in PLAIN for value in new.values()):
                mine.clear()
                mine.update(before)
                assigned[place] = found, new
        return assigned

    @staticmethod
    def keep(assigned: list[dict[int, tuple[Any, dict[str, Any]]]]) -> None:
        """Assign in the objects what several calls have, each from where all began.

        Raises:
            BatchingError: they have not assigned the same.
        """
        if any(one != assigned[0] for one in assigned):
            raise BatchingError("calls keep values that differ between the models in an object that all of them share")
        for found, values in assigned[0].values():
            vars(found).update(values)
