"""The Python values that a traced step takes for constants, and whether they are still what they were."""

from __future__ import annotations

import dis
import operator
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..vmap import HOOKS, place
from .compilable import CannotCompile

__all__ = ["Guards"]

_TRUSTED = {*sys.stdlib_module_names, "torch", "numpy", "mbkit"}  # their functions read nothing that a user changes
_OF_TORCH = set(vars(nn.Module())) - {"training"}
_NOT_NAMED = """__call__ __getattr__ __getitem__ __enter__ __exit__ __iter__ __len__ __contains__ __bool__
    forward backward setup_context vmap""".split()  # methods that are called without their name
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
_CONTAINERS = (tuple, list, dict, set, frozenset, deque)
_MOST = 20_000  # values; to look at one takes a tenth of a microsecond, at every step
_MOST_BYTES = 1 << 16  # of an array, which has to be compared


class Guards:
    """Finds the values that `forward` and `loss_fn` may read beside their arguments, and tells whether one has changed.

    The modules' attributes are looked at; of every function of the user's that is reached its closure, its defaults
    and the globals that it names; the attributes that those functions name, of every object, class and Python module
    that is reached; and what lists, dicts and sets hold. Functions of torch, numpy and Python are not followed.

    Args:
        template: the module that is called.
        loss_fn: the loss function.
        inputs: the tensors that the graph takes as arguments, so that their numbers may change.

    Attributes:
        marks: pairs of a value's name and something that stays equal as long as the value does. They are valid while
            this object lives.

    Raises:
        CannotCompile: something whose next value cannot be looked at, or too many values.
    """

    def __init__(self, template: nn.Module, loss_fn: Any, inputs: list[Tensor]) -> None:
        self.marks: list[tuple[str, Any]] = []
        self._inputs = set(map(id, inputs))
        self._places = [(t, place(t)) for t in inputs]
        self._slots: list[tuple[tuple[Callable, Callable, Callable], Any, bool, str]] = []
        self._values: list[Any] = []  # what the slots hold
        self._contents: list[tuple[Any, list, str]] = []  # what lists, dicts and sets hold
        self._versions: list[tuple[Any, Any, str]] = []  # of tensors and arrays
        self._states = [_state(random, "Python's random")]
        if "numpy" in sys.modules:
            self._states.append(_state(sys.modules["numpy"].random, "numpy.random"))
        self._owners: dict[int, tuple[Any, str]] = {}  # objects, of which the named attributes are looked at
        self._names, self._stored = set(_NOT_NAMED), set()
        self._seen: dict[int, tuple[int, Any]] = {}  # which keeps the ids valid
        self._known: dict[tuple[int, Any], Any] = {}
        self._visit(template, "")
        self._visit(loss_fn, "loss_fn")
        size = -1
        while size != len(self._seen) + len(self._names) + len(self._stored):
            size = len(self._seen) + len(self._names) + len(self._stored)
            for owner, name in list(self._owners.values()):
                self._visit_attributes(owner, name)

    @property
    def same(self) -> bool:
        """Whether every value is still the very same object and holds the same."""
        now = [get(key) for (get, _, _), key, _, _ in self._slots]
        return (
            all(map(operator.is_, now, self._values))
            and all(_holds(held, contents) for held, contents, _ in self._contents)
            and all(_version(held) == version for held, version, _ in self._versions)
            and all(place(tensor) == where for tensor, where in self._places)
        )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Undo what calls in a `with` block change of the values: a traced call is not one of the user's.

        Raises:
            CannotCompile: there was something to undo.
        """
        states = [(name, get, put, pickle.dumps(get())) for name, get, put in self._states]
        copies = [held.clone() if isinstance(held, Tensor) else held.copy() for held, *_ in self._versions]
        changed: list[str] = []
        try:
            yield
        finally:
            changed += self._undo(states, copies)
        if changed:
            raise CannotCompile(f"a call changes {changed[0]}, which a compiled step cannot do")

    def _undo(self, states: list, copies: list) -> Iterator[str]:
        for ((get, put, drop), key, there, name), value in zip(self._slots, self._values, strict=True):
            if get(key) is not value:
                put(key, value) if there else drop(key)
                yield name
        for held, contents, name in self._contents:
            if not _holds(held, contents):
                _refill(held, contents)
                yield name
        for (held, version, name), copied in zip(self._versions, copies, strict=True):
            is_tensor = isinstance(held, Tensor)  # some kernels that edit tensors leave their versions as they were
            if _version(held) != version or (is_tensor and not torch.equal(held, copied)):
                (held.data if is_tensor else held)[...] = copied
                yield name
        for name, get, put, state in states:
            if pickle.dumps(get()) != state:
                put(pickle.loads(state))
                yield name

    def _visit(self, value: Any, name: str) -> None:
        """Note a value, and go on with what it holds."""
        if len(self.marks) > _MOST:
            raise CannotCompile(f"forward and loss_fn may read more than {_MOST:,} Python values")
        if isinstance(value, _PLAIN):
            self.marks.append((name, (type(value), repr(value))))
            return
        is_known, is_input = id(value) in self._seen, id(value) in self._inputs
        number, _ = self._seen.setdefault(id(value), (len(self._seen), value))
        self.marks.append((name, (number, "input" if is_input else _identity(value))))
        if is_input or is_known:
            return
        if isinstance(value, Tensor) or (hasattr(value, "tobytes") and hasattr(value, "copy")):  # numpy's have both
            version = _version(value)
            if not isinstance(value, Tensor) and len(version) > _MOST_BYTES:
                raise CannotCompile(f"{name} is a large array: make it a tensor")
            self._versions.append((value, version, name))
            self.marks.append((name, version))
        elif isinstance(value, _CONTAINERS):
            self._visit_contents(value, name)
        elif isinstance(value, nn.Module):
            self._visit_module(value, name)
        elif isinstance(value, FunctionType):
            self._visit_function(value, name)
        elif isinstance(value, (MethodType, BuiltinFunctionType, partial)):
            for part in ("__self__", "__func__", "func", "args", "keywords"):
                self._visit(getattr(value, part, None), name)
        elif hasattr(type(value), "__next__"):
            raise CannotCompile(f"{name} is an iterator, whose next value cannot be looked at")
        elif not (isinstance(value, (type, ModuleType)) and _is_trusted(value)):
            self._visit_object(value, name)

    def _visit_contents(self, held: Any, name: str) -> None:
        if not isinstance(held, (tuple, frozenset)):
            self._contents.append((held, _contents(held), name))
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            self._visit(value, f"{name}[{key!r}]")

    def _visit_module(self, module: nn.Module, name: str) -> None:
        mine, path = vars(module), f"{name}." if name else ""
        for store in ("_parameters", "_buffers", "_modules", *HOOKS):
            self._contents.append((mine[store], _contents(mine[store]), name))
            for key, value in mine[store].items():
                self._visit(value, f"{path}{key}")
        for key in sorted(mine.keys() - _OF_TORCH):
            self._visit_slot(mine, key, f"{path}{key}")
        self._owners[id(module)] = module, name
        self._visit(type(module), type(module).__name__)

    def _visit_function(self, function: FunctionType, name: str) -> None:
        code = function.__code__
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if cell != type(cell)():  # else it is empty
                self._visit_slot(cell, "cell_contents", key)
        for key in ("__defaults__", "__kwdefaults__"):
            self._visit_slot(function, key, name)
        if _is_trusted(function):
            return
        read, assigned, names, stored = _names(code)
        for key in sorted(read | assigned):
            if key in function.__globals__ or key in assigned:
                self._visit_slot(function.__globals__, key, key)
            elif key in sys.modules:  # imported inside the function
                self._visit(sys.modules[key], key)
        self._names |= names
        self._stored |= stored
        self._owners[id(function)] = function, name

    def _visit_object(self, value: Any, name: str) -> None:
        state = _state(value, name) if _is_trusted(type(value)) else None
        self._states += [state] if state else []
        if hasattr(value, "cache_info"):  # functools.cache keeps what a traced call computes
            self._states.append((name, value.cache_info, lambda _: value.cache_clear()))
            self._visit(value.__wrapped__, name)
        self._owners[id(value)] = value, name
        if not isinstance(value, (type, ModuleType)):
            self._visit(type(value), type(value).__name__)

    def _visit_attributes(self, owner: Any, name: str) -> None:
        if isinstance(owner, type):
            for base in owner.__mro__:
                for key in sorted(self._names & vars(base).keys()) if not _is_trusted(base) else ():
                    self._visit_slot(base, key, f"{base.__name__}.{key}")
            return
        mine = getattr(owner, "__dict__", {})
        above = {key for base in type(owner).__mro__ if not _is_trusted(base) for key in vars(base)}
        for key in sorted((self._names & (mine.keys() | above)) | self._stored):
            slot = isinstance(getattr(type(owner), key, None), MemberDescriptorType)
            if hasattr(owner, "__dict__") or (slot and hasattr(owner, key)):
                self._visit_slot(owner if slot else mine, key, f"{name}.{key}")

    def _visit_slot(self, owner: Any, key: str, name: str) -> None:
        """Note where a value stands, and the value."""
        if (id(owner), key) in self._known:
            return
        self._known[id(owner), key] = owner
        if isinstance(owner, dict):
            access, there = (owner.get, owner.__setitem__, owner.pop), key in owner
        else:
            get = vars(owner).get if isinstance(owner, type) else partial(getattr, owner)
            access, there = (get, partial(setattr, owner), partial(delattr, owner)), True
        value = access[0](key)
        self._slots.append((access, key, there, name))
        self._values.append(value)
        if isinstance(value, (staticmethod, classmethod, property, cached_property)):
            value = next(getattr(value, name) for name in ("__func__", "fget", "func") if hasattr(value, name))
        self._visit(value, name)


def _identity(value: Any) -> Any:
    """Return what a value has to be again: of its own kind, where what it holds is looked at; else the very same."""
    if isinstance(value, FunctionType):
        return id(value.__code__)
    has_attributes = hasattr(value, "__dict__") or hasattr(type(value), "__slots__")
    if isinstance(value, (Tensor, type, ModuleType)) or not has_attributes or _is_trusted(type(value)):
        return type(value) if isinstance(value, (*_CONTAINERS, MethodType, partial, nn.Module)) else id(value)
    return type(value)


def _is_trusted(value: Any) -> bool:
    module = value.__globals__.get("__name__") if isinstance(value, FunctionType) else None
    module = module or (value.__name__ if isinstance(value, ModuleType) else value.__module__)
    return str(module).partition(".")[0] in _TRUSTED


@cache
def _names(code: CodeType) -> tuple[set[str], set[str], set[str], set[str]]:
    """Return the globals that a code reads and assigns, and the attributes that it may read and assigns."""
    found: dict[str, set[str]] = {}
    for instruction in dis.get_instructions(code):
        found.setdefault(instruction.opname, set()).add(instruction.argval)
    read = found.get("LOAD_GLOBAL", set()) | found.get("IMPORT_NAME", set())
    assigned, stored = found.get("STORE_GLOBAL", set()), found.get("STORE_ATTR", set())
    named = [names for kind, names in found.items() if kind.endswith(("_ATTR", "_METHOD", "IMPORT_FROM"))]
    names = set().union(*named)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names(constant)
            read, assigned, names, stored = read | inner[0], assigned | inner[1], names | inner[2], stored | inner[3]
        elif isinstance(constant, str) and constant.isidentifier():  # of getattr
            names.add(constant)
    return read, assigned, names, stored


def _state(value: Any, name: str) -> tuple[str, Callable, Callable] | None:
    """Return how to get and set the state of a random generator."""
    value = value.bit_generator if hasattr(type(value), "bit_generator") else value
    if type(value).__module__.startswith("numpy") and hasattr(type(value), "state"):
        return name, lambda: value.state, partial(setattr, value, "state")
    for get, put in (("getstate", "setstate"), ("get_state", "set_state")):
        if hasattr(value if isinstance(value, ModuleType) else type(value), put):
            return name, getattr(value, get), getattr(value, put)
    return None


def _contents(held: Any) -> list:
    return [*held.keys(), *held.values()] if isinstance(held, dict) else list(held)


def _holds(held: Any, contents: list) -> bool:
    now = _contents(held)
    return len(now) == len(contents) and all(map(operator.is_, now, contents))


def _refill(held: Any, contents: list) -> None:
    held.clear()
    half = len(contents) // 2
    add = held.extend if hasattr(held, "extend") else held.update
    add(zip(contents[:half], contents[half:], strict=True) if isinstance(held, dict) else contents)


def _version(value: Any) -> int | bytes:
    """Return what changes with the numbers in a tensor or an array."""
    if not isinstance(value, Tensor):
        return value.tobytes()
    return 0 if value.is_inference() else value._version
