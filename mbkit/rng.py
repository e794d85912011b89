"""The random state of torch, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["random_state", "seeded", "set_random_state"]


def random_state() -> list[Tensor]:
    """Return the states of torch's default generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(state: list[Tensor]) -> None:
    """Set them to what `random_state` returned."""
    torch.set_rng_state(state[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[1:])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for a `with` block; `torch.manual_seed` would touch accelerators as well."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
