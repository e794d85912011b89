"""The random state of torch, on every device, and of Python and NumPy; and what draws from a state of its own."""

from __future__ import annotations

import ctypes
import math
import pickle
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


class PythonGenerator:
    """A generator of Python's `random`, or of `numpy.random` as it was before numpy 1.17.

    Args:
        name: "random" or "numpy.random".
        generator: what holds the state; None for one of its own.

    Example:
        >>> own = PythonGenerator("random").manual_seed(3)
        >>> state = own.get_state()
        >>> first = own.generator.random()
        >>> own.set_state(state)
        >>> own.generator.random() == first == random.Random(3).random()
        True
    """

    def __init__(self, name: str, generator: Any = None) -> None:
        self.name = name
        self.generator = generator or (random.Random() if name == "random" else np.random.RandomState())

    def manual_seed(self, seed: int) -> PythonGenerator:
        """Seed it, as `random.seed(seed)` or `numpy.random.seed(seed % 2**32)` does, and return it."""
        self.generator.seed(seed if self.name == "random" else seed % 2**32)
        return self

    def get_state(self) -> Tensor:
        """Return its state as float64, which holds each number of it exactly."""
        if self.name == "random":
            _, words, gauss = self.generator.getstate()
            rest = [math.nan if gauss is None else gauss]
        else:
            _, words, *rest = self.generator.get_state()
        return torch.from_numpy(np.concatenate([words, rest], dtype=np.float64))

    def set_state(self, state: Tensor) -> None:
        """Put it where `get_state` found it."""
        *words, last = state.tolist()
        words = [*map(int, words)]
        if self.name == "random":
            self.generator.setstate((3, tuple(words), None if math.isnan(last) else last))
        else:
            self.generator.set_state(("MT19937", np.array(words[:-2], np.uint32), *words[-2:], last))


# Those that Python's and numpy's functions draw from.
PYTHON_GENERATORS = {
    "random": PythonGenerator("random", random.random.__self__),
    "numpy.random": PythonGenerator("numpy.random", np.random),
}


def state_of(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    """Return what gets and what sets the state of a random generator of torch, Python or numpy; None for others."""
    source = generator.bit_generator if hasattr(type(generator), "bit_generator") else generator
    if type(source).__module__.startswith("numpy") and hasattr(type(source), "state"):
        return lambda: source.state, partial(setattr, source, "state")
    for get, put in (("getstate", "setstate"), ("get_state", "set_state")):
        if hasattr(source if isinstance(source, ModuleType) else type(source), put):
            return getattr(source, get), getattr(source, put)
    return None


def _in_memory(address: int, count: int, places: Sequence[int], own: PythonGenerator) -> Callable[[], Any]:
    """Return what reads a generator's position and first word from memory, or its state where they are elsewhere."""
    found, state = (ctypes.c_uint32 * count).from_address(address), own.get_state()
    position, word = places
    known = (found[position], found[word]) == (state[624], state[0])
    return (lambda: (found[position], found[word])) if known else (lambda: own.get_state().tolist())


_PYTHON, _NUMPY = random.random.__self__, np.random.get_bit_generator()
_MARKS = [
    _in_memory(id(_PYTHON) + object.__basicsize__, 2, (0, 1), PYTHON_GENERATORS["random"]),
    _in_memory(_NUMPY.ctypes.state_address, 625, (624, 0), PYTHON_GENERATORS["numpy.random"]),
]


def generator_marks() -> Sequence[Any]:
    """Return one mark for each of them, which differs once the generator has moved; it takes a microsecond.

    To read a state would take Python 10 microseconds and numpy 30, at every call. So where the next number stands is
    read from memory, and one of the 624 words, which all change once they are used up.
    """
    numpy = np.random.get_bit_generator()  # np.random.set_bit_generator may have put another in its place
    return (_MARKS[0](), _PYTHON.gauss_next), _MARKS[1]() if numpy is _NUMPY else pickle.dumps(numpy.state)


def moved_generators(before: Sequence[Any]) -> list[str]:
    """Return the names of the generators that have moved since `generator_marks` returned `before`."""
    return [name for name, was, now in zip(PYTHON_GENERATORS, before, generator_marks(), strict=True) if was != now]


def random_state() -> list[Tensor]:
    """Return the states of torch's default generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(state: list[Tensor]) -> None:
    """Set them to what `random_state` returned."""
    torch.set_rng_state(state[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[1:])


def global_state(python: bool = True) -> dict[str, Any]:
    """Return the states of torch's default generators and, unless `python` is False, of Python's and NumPy's."""
    own = {name: own.get_state() for name, own in PYTHON_GENERATORS.items()} if python else {}
    return {"torch": random_state(), **own}


def set_global_state(state: dict[str, Any], python: bool = True) -> None:
    """Set them to what `global_state` returned; those of Python and NumPy stay where they are if it lacks them."""
    set_random_state(state["torch"])
    for name in PYTHON_GENERATORS.keys() & state.keys() if python else ():
        PYTHON_GENERATORS[name].set_state(state[name])


GENERATOR = threading.RLock()  # torch's default generator is one for all threads


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for a `with` block; `torch.manual_seed` would touch accelerators as well."""
    with GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


_QUIET = 3  # uses without a draw after which Python's and numpy's states are no longer swapped: it takes 0.5 ms


class OwnDraws:
    """The random state that a lone model has to itself, while others draw in between; `drew` says whether it moved.

    Args:
        seed: from which it starts, as after `torch.manual_seed(seed)`; Python's and numpy's generators, if they are
            drawn from, as after `random.seed(seed)` and `numpy.random.seed(seed % 2**32)`.
    """

    drew = False

    def __init__(self, seed: int) -> None:
        before = random_state()
        torch.manual_seed(seed)
        self._state = {name: PythonGenerator(name).manual_seed(seed).get_state() for name in PYTHON_GENERATORS}
        self._state["torch"] = random_state()
        set_random_state(before)
        self._quiet = 0  # how often in a row Python's and numpy's generators stayed where they were

    @contextmanager
    def current(self) -> Iterator[None]:
        """Draw from it in a `with` block; afterwards torch's and Python's generators stand where they stood."""
        python, own = self._quiet <= _QUIET, self._state
        before = global_state(python)
        set_global_state(own, python)
        marks = generator_marks()
        try:
            yield
        finally:
            moved = bool(moved_generators(marks))
            self._state = own | global_state(python)
            set_global_state(before)
        self._quiet = -math.inf if moved else self._quiet + 1
        self.drew |= moved or not all(map(torch.equal, own["torch"], self._state["torch"]))


def in_turn(models: Iterable[int]) -> Iterator[int]:
    """Yield the models' numbers, each from the same state of the global random generators of torch, Python and NumPy.

    So what is drawn while a model has its turn, in a callback for instance, is what would be drawn if it were the only
    one, and afterwards the generators stand as if it had been.

    Example:
        >>> import random
        >>> len({random.random() for _ in in_turn(range(3))})
        1
    """
    start, marks = global_state(), generator_marks()
    for turn, m in enumerate(models):
        if turn:
            set_global_state(start, python=generator_marks() != marks)  # to set those takes a while
        yield m
