"""The Python values that a traced step takes for constants, and whether they are still what they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..batch.places import Snapshot
from ..batch.python_values import CONTAINERS, PLAIN, PythonValues
from ..common.functions import parts_of, user_made
from ..vmap import place, version
from .compilable import CannotCompile

_MOST = 20_000  # values; to look at one takes a tenth of a microsecond, at every step
_MOST_BYTES = 1 << 16  # of an array, which has to be compared


class Guards:
    """Finds the values that `forward` and `loss_fn` may read beside their arguments, and tells whether one has changed.

    Args:
        roots: the module that is called, the loss function and its settings, by name; no name for the module.
        inputs: the tensors that the graph takes as arguments, so that their numbers may change.

    Attributes:
        marks: pairs of a value's name and something that stays equal as long as the value does. They are valid while
            this object lives.

    Raises:
        CannotCompile: something whose next value cannot be looked at, or too many values.
    """

    def __init__(self, roots: dict[str, Any], inputs: list[Tensor]) -> None:
        self._inputs = [(t, place(t)) for t in inputs]
        self._ids = set(map(id, inputs))
        self._values = values = PythonValues(roots.items(), inputs)
        self._snapshot = Snapshot(values.places)
        self._versions = [(value, version(value)) for _, value in values.tensors]
        if sum(map(len, self._snapshot.contents)) > _MOST:
            values.unseen = values.unseen or f"forward and loss_fn may read more than {_MOST:,} Python values"
        for name, value in values.tensors:
            if not isinstance(value, Tensor) and value.nbytes > _MOST_BYTES:
                values.unseen = values.unseen or f"{name} is a large array: make it a tensor"
        if values.unseen:
            raise CannotCompile(values.unseen)
        self.marks: list[tuple[str, Any]] = [(name, self._mark(root)) for name, root in roots.items()]
        for (_, _, name), contents in zip(values.places, self._snapshot.contents, strict=True):
            items = contents.items() if isinstance(contents, dict) else enumerate(contents)
            self.marks.append((name, tuple((key, self._mark(value)) for key, value in items)))
        names = (name for name, _ in values.tensors)
        self.marks += [(name, mark) for name, (_, mark) in zip(names, self._versions, strict=True)]

    @property
    def same(self) -> bool:
        """Whether every value is still the very same object and holds the same."""
        return (
            self._snapshot.holds
            and all(version(value) == was for value, was in self._versions)
            and all(place(tensor) == where for tensor, where in self._inputs)
        )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Undo what calls in a `with` block change of the values: a traced call is not one of the user's.

        Raises:
            CannotCompile: there was something to undo.
        """
        undo, changed = self._values.remember(), []
        try:
            yield
        finally:
            changed += undo()
        if changed:
            raise CannotCompile(f"a call changes {changed[0]}, which a compiled step cannot do")

    def _mark(self, value: Any) -> Any:
        """Return what a value has to be again: equal; or of its own kind, where what it holds is looked at; or itself.

        An object is told from others by the number under which the walk has met it.
        """
        if isinstance(value, PLAIN):
            return type(value), repr(value)
        parts = parts_of(value)
        if parts is not None:
            return type(value), tuple(map(self._mark, parts))
        number, _ = self._values.numbers[id(value)]
        if id(value) in self._ids:
            return number, "input"
        if isinstance(value, FunctionType):
            return number, id(value.__code__)
        if isinstance(value, (*CONTAINERS, nn.Module)):
            return number, type(value)
        has_attributes = hasattr(value, "__dict__") or hasattr(type(value), "__slots__")
        is_own = has_attributes and not isinstance(value, (Tensor, type, ModuleType)) and user_made(type(value))
        return number, type(value) if is_own else id(value)
