"""The random state of torch, on every device, and what draws from a state of its own."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .python_random import PYTHON_GENERATORS, PythonGenerator, generator_marks, moved_generators

__all__ = ["GENERATOR", "OwnDraws", "in_turn", "random_state", "seeded", "set_random_state"]


def random_state() -> list[Tensor]:
    """Return the states of torch's default generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(state: list[Tensor]) -> None:
    """Set them to what `random_state` returned."""
    torch.set_rng_state(state[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[1:])


GENERATOR = threading.RLock()  # torch's default generator is one for all threads


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for a `with` block; `torch.manual_seed` would touch accelerators as well."""
    with GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


_QUIET = 3  # uses after which nobody swaps Python's and numpy's states any longer, which takes half a millisecond


class OwnDraws:
    """The random state that a lone model has to itself, while others draw in between; `drew` says whether it moved.

    Args:
        seed: from which it starts, as after `torch.manual_seed(seed)`; Python's and numpy's generators, if they are
            drawn from, as after `random.seed(seed)` and `numpy.random.seed(seed % 2**32)`.
    """

    drew = False

    def __init__(self, seed: int) -> None:
        with _kept():
            torch.manual_seed(seed)
            self._state = random_state()
        self._python = {name: PythonGenerator(name).manual_seed(seed) for name in PYTHON_GENERATORS}
        self._quiet = 0  # how often in a row Python's and numpy's generators stayed where they were

    @contextmanager
    def current(self) -> Iterator[None]:
        """Draw from it in a `with` block; afterwards torch's and Python's generators stand where they stood."""
        mine = {} if self._quiet > _QUIET else self._python
        before = {name: PYTHON_GENERATORS[name].get_state() for name in mine}
        with _kept():
            set_random_state(self._state)
            for name, own in mine.items():
                PYTHON_GENERATORS[name].set_state(own.get_state())
            marks = generator_marks()
            try:
                yield
            finally:
                moved = moved_generators(marks)
                for name, own in mine.items():
                    own.set_state(PYTHON_GENERATORS[name].get_state())
                    PYTHON_GENERATORS[name].set_state(before[name])
            torch_state, self._state = self._state, random_state()
        self._quiet = -math.inf if moved else self._quiet + 1
        self.drew |= bool(moved) or any(not torch.equal(a, b) for a, b in zip(torch_state, self._state, strict=True))


@contextmanager
def _kept() -> Iterator[None]:
    """As torch.random.fork_rng, which warns where there are several GPUs."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def in_turn(models: Iterable[int]) -> Iterator[int]:
    """Yield the models' numbers, each from the same state of the global random generators of torch, Python and NumPy.

    So what is drawn while a model has its turn, in a callback for instance, is what would be drawn if it were the only
    one, and afterwards the generators stand as if it had been.

    Example:
        >>> len({random.random() for _ in in_turn(range(3))})
        1
    """
    start, marks = (random_state(), random.getstate(), np.random.get_state()), generator_marks()
    for turn, m in enumerate(models):
        if turn:
            set_random_state(start[0])
        if generator_marks() != marks:  # to set them takes a while
            random.setstate(start[1])
            np.random.set_state(start[2])
        yield m
