"""Objects in plain attributes that all models share, such as a configuration, and what calls note in them.

Alone, each model has its own, so models that are called one after the other, or in chunks, each have to find them as
they were before the first.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..common.objects import PerModelValue
from .errors import BatchingError, ClosedOutput
from .state import PLAIN

_NEW = object()
_OTHERS = (
    Tensor, nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType,
    PerModelValue,
)  # fmt: skip


def is_object(leaf: Any) -> bool:
    """Say whether a value is an object that calls may note something in."""
    return hasattr(leaf, "__dict__") and not isinstance(leaf, _OTHERS)


class SharedObjects:
    """Objects that all models share, as they were before a call of some of the models, or of all at once."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[str, Any, dict[str, Any], list[Any]]] = {}  # name, object, attributes, leaves

    def __contains__(self, leaf: Any) -> bool:
        return id(leaf) in self._before

    def note(self, name: str, leaves: Iterable[Any]) -> None:
        """Note the objects among the leaves of an attribute as they are now."""
        for leaf in leaves:
            if is_object(leaf) and leaf not in self:
                self._before[id(leaf)] = name, leaf, dict(vars(leaf)), tree_leaves(vars(leaf))

    def take_back(self) -> dict[int, tuple[Any, dict[str, Any]]]:
        """Put the objects back as they were; return the numbers and texts that have been assigned in them.

        Returns:
            By the objects' ids: the object, and the names and values.

        Raises:
            BatchingError: something else has been put into one.
        """
        assigned = {}
        for place, (name, found, before, inside) in self._before.items():
            mine, now = vars(found), tree_leaves(vars(found))
            if len(now) == len(inside) and all(map(is_, now, inside)):
                continue
            new = {key: value for key, value in mine.items() if value is not before.get(key, _NEW)}
            is_plain = new and mine.keys() >= before.keys() and all(type(value) in PLAIN for value in new.values())
            mine.clear()
            mine.update(before)
            if not is_plain:
                raise BatchingError(
                    f"'{name}' holds an object that all models share, and a call keeps a value in it: keep it in a "
                    "buffer, an attribute, a list or a dict of the module instead"
                )
            assigned[place] = found, new
        return assigned

    def refuse_tensors(self) -> None:
        """Refuse a tensor of all models at once in an object that is one for all; put the object back.

        Raises:
            ClosedOutput: there is one.
        """
        for name, found, before, inside in self._before.values():
            new = [leaf for leaf in tree_leaves(vars(found)) if isinstance(leaf, Tensor)]
            if not all(any(tensor is one for one in inside) for tensor in new):
                vars(found).clear()
                vars(found).update(before)
                raise ClosedOutput(f"it keeps a tensor in '{name}', in an object that all models share")

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
