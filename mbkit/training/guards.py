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
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..vmap import HOOKS, place
from .compilable import CannotCompile

__all__ = ["Guards", "form"]

_TRUSTED = {*sys.stdlib_module_names, "torch", "numpy", "mbkit"}  # their functions read nothing that a user changes
_OF_TORCH = {*vars(nn.Module()), "mbkit_path"} - {"training"}
_NOT_NAMED = """__call__ __getattr__ __getitem__ __enter__ __exit__ __iter__ __len__ __contains__ forward backward
    setup_context vmap""".split()  # what is called without its name
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
_MOST = 20_000  # values; to look at one takes a tenth of a microsecond, at every step
_MOST_BYTES = 1 << 16  # of a numpy array, which has to be compared


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
        self._inputs = {id(t): i for i, t in enumerate(inputs)}
        self._places = [(t, place(t)) for t in inputs]
        self._slots: list[tuple[tuple[Callable, Callable, Callable], Any, bool, str]] = []
        self._values: list[Any] = []  # what the slots hold
        self._contents: list[tuple[Any, list, str]] = []  # what lists, dicts and sets hold
        self._versions: list[tuple[Callable, Any, Any]] = []  # of tensors and arrays
        self._states = [_state(random, "Python's random")]
        if "numpy" in sys.modules:
            self._states.append(_state(sys.modules["numpy"].random, "numpy.random"))
        self._owners: dict[int, tuple[Any, str]] = {}  # objects, of which the named attributes are looked at
        self._names, self._stored = set(_NOT_NAMED), set()
        self._seen: dict[int, Any] = {}
        self._known: set[tuple[int, Any]] = set()
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
            and all(get(held) == version for get, held, version in self._versions)
            and all(place(tensor) == where for tensor, where in self._places)
        )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Undo what calls in a `with` block change of the values: a traced call is not one of the user's.

        Raises:
            CannotCompile: there was something to undo.
        """
        states = [(name, get, put, pickle.dumps(get())) for name, get, put in self._states]
        changed: list[str] = []
        try:
            yield
        finally:
            changed += self._undo(states)
        if changed:
            raise CannotCompile(f"a call changes {changed[0]}, which a compiled step cannot do")

    def _undo(self, states: list) -> Iterator[str]:
        for ((get, put, drop), key, there, name), value in zip(self._slots, self._values, strict=True):
            if get(key) is not value:
                put(key, value) if there else drop(key)
                yield name
        for held, contents, name in self._contents:
            if not _holds(held, contents):
                _refill(held, contents)
                yield name
        for name, get, put, state in states:
            if pickle.dumps(get()) != state:
                put(pickle.loads(state))
                yield name

    def _visit(self, value: Any, name: str) -> None:
        """Note a value, and go on with what it holds."""
        if isinstance(value, _PLAIN):
            self.marks.append((name, (type(value), repr(value))))
            return
        if id(value) in self._inputs:
            self.marks.append((name, (self._inputs[id(value)], form(value))))
            return
        self.marks.append((name, id(getattr(value, "__code__", value))))
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if len(self._seen) + len(self._slots) > _MOST:
            raise CannotCompile(f"forward and loss_fn may read more than {_MOST:,} Python values")
        if isinstance(value, Tensor):
            self._note_version(_version, value, name)
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            if value.nbytes > _MOST_BYTES:
                raise CannotCompile(f"{name} is a large numpy array: make it a tensor")
            self._note_version(operator.methodcaller("tobytes"), value, name)
        elif isinstance(value, (tuple, list, dict, set, frozenset, deque)):
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

    def _note_version(self, get: Callable, value: Any, name: str) -> None:
        self._versions.append((get, value, get(value)))
        self.marks.append((name, get(value)))

    def _visit_contents(self, held: Any, name: str) -> None:
        if not isinstance(held, (tuple, frozenset)):
            self._contents.append((held, _contents(held), name))
        if isinstance(held, dict):
            pairs = [(f"{name}[{key!r}]", value) for key, value in held.items()]
        else:
            pairs = [(f"{name}[{i}]", value) for i, value in enumerate(held)]
        for path, value in pairs:
            self._visit(value, path)

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
        for key in read | assigned:
            if key in function.__globals__ or key in assigned:
                self._visit_slot(function.__globals__, key, key)
            elif key in sys.modules:  # imported inside the function
                self._visit(sys.modules[key], key)
        self._names |= names
        self._stored |= stored
        self._owners[id(function)] = function, name

    def _visit_object(self, value: Any, name: str) -> None:
        if state := _state(value, name):
            self._states.append(state)
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
        self._known.add((id(owner), key))
        self._seen[id(owner)] = owner
        if isinstance(owner, dict):
            access, there = (owner.get, owner.__setitem__, owner.pop), key in owner
        else:
            get = vars(owner).get if isinstance(owner, type) else partial(getattr, owner)
            access, there = (get, partial(setattr, owner), partial(delattr, owner)), True
        value = access[0](key)
        self._slots.append((access, key, there, name))
        self._values.append(value)
        for inside in ("__func__", "fget", "func"):  # of static and class methods, of properties
            if isinstance(value, (staticmethod, classmethod, property)) or type(value).__name__ == "cached_property":
                value = getattr(value, inside, value)
        self._visit(value, name)


def form(tensor: Tensor) -> tuple:
    """Return what a graph takes for granted of a tensor that it gets as an argument."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


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
    if isinstance(held, dict):
        held.update(zip(contents[: len(contents) // 2], contents[len(contents) // 2 :], strict=True))
    else:
        (held.update if isinstance(held, set) else held.extend)(contents)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
