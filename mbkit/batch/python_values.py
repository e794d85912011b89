"""The Python values that functions of the user's may read or change beside their arguments: found, compared, put back.

One walk serves all that must know them: what a loss function keeps becomes each model's own (`kept`), and a compiled
step looks whether what it took for constants is as it was (`training.guards`).
"""

from __future__ import annotations

import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..common.functions import DYNAMIC, names_in, parts_of, user_made
from ..common.random_streams import PYTHON_GENERATORS, state_of
from ..vmap import HOOKS, OnStack, version
from .places import Place, Snapshot, read

PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
CONTAINERS = (list, dict, set, deque)
_OF_TORCH = set(vars(nn.Module())) - {"training"}
_NOT_NAMED = """__call__ __getattr__ __getitem__ __enter__ __exit__ __iter__ __len__ __contains__ __bool__
    forward backward setup_context vmap""".split()  # methods that are called without their name
_MOST = 20_000  # objects; and places, five times as many
_LONGEST = 100_000  # of a list; longer ones are data, and to look at one takes milliseconds


class PythonValues:
    """What can be reached from some functions and modules, at the time when this is made.

    Of every function of the user's that is reached: its closure, its defaults and the globals that it names. Of every
    object, class and Python module: the attributes that those functions name. Of a torch module: all its attributes.
    Functions of torch, numpy and Python are not followed. What is nearest is looked at first, for the code of a large
    library leads everywhere.

    Args:
        roots: functions, modules or objects by their names; "" for no name.
        known: tensors that are somebody else's concern.
        names: of methods that are called.
        most: how many objects are looked at.

    Attributes:
        places: where values stand.
        tensors, generators, caches: names, and tensors and arrays; what gets and sets a random generator's state;
            functions that `functools.cache` has wrapped.
        numbers: of the objects, by their ids, in the order in which they were met; and the objects.
        unseen: why not everything can be looked at, in words; empty if it can.
    """

    def __init__(
        self,
        roots: Iterable[tuple[str, Any]],
        known: Iterable[Tensor] = (),
        names: Iterable[str] = (),
        most: int = _MOST,
    ) -> None:
        self.places: list[Place] = []
        self.tensors: list[tuple[str, Any]] = []
        self.generators = [(name, *state_of(g.generator)) for name, g in PYTHON_GENERATORS.items()]
        self.caches: list[tuple[str, Any]] = []
        self.unseen = ""
        self.numbers: dict[int, tuple[int, Any]] = {}
        self._known, self._most = set(map(id, known)), most
        self._waiting: deque[tuple[Any, str]] = deque()  # what has been met and not been looked at
        self._slots: set[tuple[int, str]] = set()
        self._owners: dict[int, tuple[Any, str]] = {}  # objects, of which the named attributes are looked at
        self._names, self._stored = {*_NOT_NAMED, *names}, set()
        for name, root in roots:
            self._visit(root, name)
            if isinstance(root, FunctionType):
                self._owners[id(root)] = root, name
        size = -1
        while not self._is_full and size != (size := len(self.numbers) + len(self._names) + len(self._stored)):
            while self._waiting and not self._is_full:
                self._open(*self._waiting.popleft())
            for owner, name in list(self._owners.values()):
                if not self._is_full:
                    self._visit_attributes(owner, name)
        if self._is_full:
            self.unseen = self.unseen or f"forward and loss_fn may read more than {most:,} Python values"
        whole = {id(place.owner) for place in self.places if place.key is None}
        self.places = [place for place in self.places if place.key is None or id(place.owner) not in whole]

    def remember(self) -> Callable[[], list[str]]:
        """Return a function that puts everything back as it is now, and returns the names of what had changed."""
        snapshot = Snapshot(self.places)
        copies = [(v, version(v), v.clone() if isinstance(v, Tensor) else v.copy(), name) for name, v in self.tensors]
        states = [(name, get, put, pickle.dumps(get())) for name, get, put in self.generators]
        misses = [cached.cache_info().misses for _, cached in self.caches]

        def undo() -> list[str]:
            changed = snapshot.put(snapshot.contents)
            for value, was, copied, name in copies:
                is_tensor = isinstance(value, Tensor)  # some kernels edit tensors and count no version
                if version(value) != was or (is_tensor and not torch.equal(value, copied)):
                    (value.data if is_tensor else value)[...] = copied
                    changed.append(name)
            for name, get, put, state in states:
                if pickle.dumps(get()) != state:
                    put(pickle.loads(state))
                    changed.append(name)
            for (name, cached), count in zip(self.caches, misses, strict=True):
                if cached.cache_info().misses != count:
                    cached.cache_clear()
                    changed.append(name)
            return changed

        return undo

    # ------------------------------------------------------------------ the walk

    @property
    def _is_full(self) -> bool:
        return len(self.numbers) > self._most or len(self.places) > 5 * self._most

    def _visit(self, value: Any, name: str) -> None:
        """Note a value, to go on with what it holds."""
        if not isinstance(value, PLAIN) and id(value) not in self.numbers:
            self.numbers[id(value)] = (len(self.numbers), value)
            self._waiting.append((value, name))

    def _open(self, value: Any, name: str) -> None:
        kind, parts = type(value), parts_of(value)
        if id(value) in self._known or kind.__module__ == "logging":  # a logger knows all others
            return
        if isinstance(value, Tensor) or (hasattr(kind, "tobytes") and hasattr(kind, "copy")):  # numpy's have both
            self.tensors.append((name, value))
        elif parts is not None:
            for part in parts:
                self._visit(part, name)
        elif isinstance(value, CONTAINERS):
            self._visit_contents(value, name)
        elif isinstance(value, nn.Module):
            self._visit_module(value, name)
        elif isinstance(value, FunctionType):
            self._visit_function(value, name)
        elif hasattr(kind, "cache_info"):
            self.caches.append((name, value))
            self._visit(value.__wrapped__, name)
        elif hasattr(kind, "__next__"):
            self.unseen = self.unseen or f"{name} is an iterator, whose next value cannot be looked at"
        elif not isinstance(value, (type, ModuleType)):
            state = state_of(value) if not user_made(kind) else None
            self.generators += [(name, *state)] if state else []
            self._owners[id(value)] = value, name
            self._visit(kind, kind.__name__)
        elif user_made(value):
            self._owners[id(value)] = value, name

    def _visit_contents(self, held: Any, name: str) -> None:
        if len(held) > _LONGEST:
            self.unseen = self.unseen or f"{name} has more than {_LONGEST:,} items"
            return
        self.places.append(Place(held, None, name))
        for key, value in list(dict.items(held) if isinstance(held, dict) else enumerate(held)):
            self._visit(value, f"{name}[{key!r}]")

    def _visit_module(self, module: nn.Module, name: str) -> None:
        if hasattr(module, "stacked_params"):  # a batch itself
            return
        mine, path = vars(module), f"{name}." if name else ""
        for store in ("_parameters", "_buffers", "_modules", *HOOKS):
            self.places.append(Place(mine[store], None, name))
            for key, value in list(mine[store].items()):
                self._visit(value, f"{path}{key}")
        for key in sorted(mine.keys() - _OF_TORCH):
            self._visit_slot(mine, key, f"{path}{key}")
        self._owners[id(module)] = module, name
        self._visit(type(module), type(module).__name__)

    def _visit_function(self, function: FunctionType, name: str) -> None:
        code = function.__code__
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._visit_slot(cell, "cell_contents", key)
        if not user_made(function):
            return
        for key in ("__defaults__", "__kwdefaults__"):
            if getattr(function, key):
                self._visit_slot(function, key, name)
        found, assigned, names, stored = names_in(code)
        for key in sorted(found | assigned):
            if key in function.__globals__ or key in assigned:
                self._visit_slot(function.__globals__, key, key)
            elif key in sys.modules:  # imported inside the function
                self._visit(sys.modules[key], key)
        self._names |= names
        self._stored |= stored

    def _visit_attributes(self, owner: Any, name: str) -> None:
        if isinstance(owner, type):
            for base in filter(user_made, owner.__mro__):
                for key in sorted(self._names & vars(base).keys()):
                    self._visit_slot(base, key, f"{base.__name__}.{key}")
            return
        mine = getattr(owner, "__dict__", {})
        if not isinstance(mine, dict):  # list[int] has that of its class
            return
        has_dict, is_module = hasattr(owner, "__dict__"), isinstance(owner, (nn.Module, ModuleType))
        if self._names & DYNAMIC and has_dict and not is_module:
            self._visit(mine, name)
        above = {key for base in filter(user_made, type(owner).__mro__) for key in vars(base)}
        for key in sorted((self._names & (mine.keys() | above)) | self._stored):
            slot = isinstance(getattr(type(owner), key, None), MemberDescriptorType)
            if has_dict or (slot and hasattr(owner, key)):
                self._visit_slot(owner if slot else mine, key, f"{name}.{key}")

    def _visit_slot(self, owner: Any, key: str, name: str) -> None:
        """Note where a value stands, and the value."""
        if (id(owner), key) in self._slots:
            return
        self._slots.add((id(owner), key))
        place = Place(owner, key, name)
        values = read(place)
        if any(type(value) is OnStack for value in values):  # a batch's own
            return
        self.places.append(place)
        for value in values:
            self._visit(value, name)
            if isinstance(value, FunctionType) and user_made(value) and not isinstance(owner, type):
                self._owners.setdefault(id(value), (value, name))  # code that names a function may keep things on it
