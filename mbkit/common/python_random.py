"""Python's and numpy's generators, with the methods of a torch.Generator, and a quick look at whether they moved."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PYTHON_GENERATORS", "PythonGenerator", "generator_marks", "moved_generators"]


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
            return torch.tensor([*words, math.nan if gauss is None else gauss], dtype=torch.float64)
        _, words, *rest = self.generator.get_state()
        return torch.tensor([*words.tolist(), *rest], dtype=torch.float64)

    def set_state(self, state: Tensor) -> None:
        """Put it where `get_state` found it."""
        *words, last = state.tolist()
        if self.name == "random":
            self.generator.setstate((3, tuple(map(int, words)), None if math.isnan(last) else last))
        else:
            *words, position, has_gauss = map(int, words)
            self.generator.set_state(("MT19937", np.array(words, np.uint32), position, has_gauss, last))


# Those that Python's and numpy's functions draw from.
PYTHON_GENERATORS = {
    "random": PythonGenerator("random", random.random.__self__),
    "numpy.random": PythonGenerator("numpy.random", np.random),
}


def generator_marks() -> Sequence[Any]:
    """Return one mark for each of them, which differs once the generator has moved; it takes a microsecond.

    To read a state would take Python 30 microseconds and numpy 110, at every call. So where the next number stands is
    read from memory, and one of the 624 words, which all change once they are used up.
    """
    python, numpy = random.random.__self__, np.random.get_bit_generator()
    return (_look(python, _python_words), python.gauss_next), _look(numpy, _numpy_words)


def moved_generators(before: Sequence[Any]) -> list[str]:
    """Return the names of the generators that have moved since `generator_marks` returned `before`."""
    return [name for name, was, now in zip(PYTHON_GENERATORS, before, generator_marks(), strict=True) if was != now]


_places: dict[int, tuple[Any, Callable[[], Any]]] = {}  # by the id of a generator, which is kept lest the id be reused


def _look(generator: Any, words: Callable) -> Any:
    if id(generator) not in _places:
        _places[id(generator)] = generator, words(generator)
    return _places[id(generator)][1]()


def _python_words(generator: random.Random) -> Callable[[], Any]:
    """Return what reads a generator's mark: from memory where it lies as expected, else from its state."""
    found = (ctypes.c_uint32 * 2).from_address(id(generator) + object.__basicsize__)  # position, first word
    _, words, _ = generator.getstate()
    return partial(tuple, found) if tuple(found) == (words[-1], words[0]) else generator.getstate


def _numpy_words(generator: Any) -> Callable[[], Any]:
    state = generator.state
    if state["bit_generator"] != "MT19937":
        return lambda: repr(generator.state)
    found = (ctypes.c_uint32 * 625).from_address(generator.ctypes.state_address)  # words, position
    known = found[624] == state["state"]["pos"] and found[0] == state["state"]["key"][0]
    return (lambda: (found[624], found[0])) if known else lambda: repr(generator.state)
