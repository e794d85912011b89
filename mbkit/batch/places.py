"""Where functions may keep values between their calls: globals, closures, attributes, lists, dicts and sets."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["Places", "at_hand", "mapped", "methods_of", "same"]

_TRUSTED = {*sys.stdlib_module_names, "torch", "numpy", "mbkit"} - {"__main__"}  # they keep nothing of the user's
_PLAIN = (int, float, complex, str, bytes, type(None))
_MOST = 10_000  # objects; what can reach more of them is looked at in part
_LONGEST = 100_000  # of a list; longer ones are data, and to look at one takes milliseconds


class Places:
    """The places that some functions can reach, at the time when this is made.

    Args:
        functions: the user's; those of torch, numpy and Python keep nothing.

    Attributes:
        caches: the functions among them that `functools.lru_cache` has wrapped.
    """

    def __init__(self, functions: Iterable[Any]) -> None:
        self.caches: list[Any] = []
        self._places: list[tuple[Any, tuple[str, ...] | None]] = []  # where, and which names; None for all
        self._seen: dict[int, Any] = {}
        for function in functions:
            self._visit(function)

    def __len__(self) -> int:
        return len(self._places)

    def _visit(self, value: Any) -> None:
        if isinstance(value, (*_PLAIN, Tensor, type, ModuleType)) or id(value) in self._seen:
            return
        if len(self._seen) >= _MOST or _is_trusted(value) or hasattr(value, "stacked_params"):
            return
        self._seen[id(value)] = value
        inside: Iterable[Any] = ()
        if isinstance(value, FunctionType):
            inside = self._visit_function(value)
        elif isinstance(value, MethodType):
            inside = (value.__func__, value.__self__)
        elif isinstance(value, partial):
            inside = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, tuple):
            inside = value
        elif isinstance(value, (list, dict, set, deque)) and len(value) <= _LONGEST:
            self._places.append((value, None))
            inside = list(value.values() if isinstance(value, dict) else value)
        elif hasattr(value, "cache_clear") and hasattr(value, "__wrapped__"):
            self.caches.append(value)
            inside = (value.__wrapped__,)
        elif isinstance(value, nn.Module):
            self._places += [(vars(value)[store], None) for store in ("_parameters", "_buffers")]
            inside = list(value._modules.values())
        is_function = isinstance(value, (FunctionType, MethodType, partial))
        if hasattr(value, "__dict__") and not is_function and methods_of(type(value)):
            self._places.append((vars(value), None))
            inside = (*inside, *vars(value).values(), *methods_of(type(value)))
        for one in inside:
            self._visit(one)

    def _visit_function(self, function: FunctionType) -> list[Any]:
        cells = function.__closure__ or ()
        self._places += [(cell, None) for cell in cells if not isinstance(_read(cell, None).get(""), type)]
        found = function.__globals__
        values = {name: found[name] for name in sorted(_names(function.__code__)) if name in found}
        rebound = tuple(n for n, v in values.items() if not isinstance(v, (type, ModuleType, FunctionType)))
        self._places += [(found, rebound)] if rebound else []
        return [*at_hand(function), *values.values()]

    def read(self) -> list[Any]:
        """Return what is at each place now: names and values, or a copy of a list, dict or set."""
        return [_read(*place) for place in self._places]

    def write(self, contents: list[Any]) -> None:
        """Put contents back."""
        for place, wanted in zip(self._places, contents, strict=True):
            if not same(_read(*place), wanted):
                _write(*place, wanted)

    def are_dicts(self) -> list[bool]:
        """Say of each place whether it is a dict, or the attributes of an object."""
        return [isinstance(place, dict) and names is None for place, names in self._places]


def _read(place: Any, names: tuple[str, ...] | None) -> Any:
    if isinstance(place, CellType):
        return {} if place == CellType() else {"": place.cell_contents}
    if isinstance(place, dict):
        return dict(place) if names is None else {name: place[name] for name in names if name in place}
    return set(place) if isinstance(place, set) else list(place)


def _write(place: Any, names: tuple[str, ...] | None, wanted: Any) -> None:
    if isinstance(place, CellType):
        if wanted:
            place.cell_contents = wanted[""]
        else:
            del place.cell_contents
    elif isinstance(place, dict):
        for name in [name for name in (place if names is None else names) if name in place and name not in wanted]:
            del place[name]
        place.update(wanted)
    elif isinstance(place, list):
        place[:] = wanted
    else:
        place.clear()
        (place.update if isinstance(place, set) else place.extend)(wanted)


def same(a: Any, b: Any) -> bool:
    """Say whether two contents hold the very same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
    return a == b if isinstance(a, set) else len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def mapped(contents: Any, function: Callable[[Any], Any]) -> Any:
    """Return contents with a function applied to the tensors and numbers in them; a list inside is a place itself."""
    if isinstance(contents, dict):
        return {name: _inside(value, function) for name, value in contents.items()}
    return contents if isinstance(contents, set) else [_inside(value, function) for value in contents]


def _inside(value: Any, function: Callable[[Any], Any]) -> Any:
    return tree_map(function, value) if isinstance(value, tuple) else function(value)


def _is_trusted(value: Any) -> bool:
    module = value.__module__ if isinstance(value, FunctionType) else None
    return module is not None and module.partition(".")[0] in _TRUSTED


def at_hand(function: Any) -> tuple:
    """Return the objects that a function has at hand."""
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        return (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return ()


def methods_of(kind: type) -> list[FunctionType]:
    """Return the functions of a class of the user's and of its bases."""
    own = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _TRUSTED]
    return [value for base in own for value in vars(base).values() if isinstance(value, FunctionType)]


def _names(code: CodeType) -> set[str]:
    """Return the names that a code may read from its globals."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
