"""Python's and numpy's generators, with the methods of a torch.Generator, and a quick look at whether they moved."""

from __future__ import annotations

import ctypes
import math
import pickle
import random
from collections.abc import Callable, Sequence
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
