"""The random state of torch, on every device, and of Python and NumPy; and what draws from a state of its own."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .python_random import PYTHON_GENERATORS, PythonGenerator, generator_marks, moved_generators


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
