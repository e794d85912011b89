"""The random state of torch, on every device, and what draws from a state of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["GENERATOR", "OwnDraws", "random_state", "seeded", "set_random_state"]


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


class OwnDraws:
    """The random state that a lone model has to itself, while others draw in between; `drew` says whether it moved.

    Args:
        seed: from which it starts, as after `torch.manual_seed(seed)`.
    """

    drew = False

    def __init__(self, seed: int) -> None:
        with _kept():
            torch.manual_seed(seed)
            self._state = random_state()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Draw from it in a `with` block; afterwards torch's generators stand where they stood."""
        with _kept():
            set_random_state(self._state)
            yield
            before, self._state = self._state, random_state()
        self.drew |= any(not torch.equal(a, b) for a, b in zip(before, self._state, strict=True))


@contextmanager
def _kept() -> Iterator[None]:
    """As torch.random.fork_rng, which warns where there are several GPUs."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
