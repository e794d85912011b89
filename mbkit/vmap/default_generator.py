"""torch's default generator, which forward may not seed, read or put back while all models run at once.

Alone it is the model's own stream. Here each model has a stream of its own, so the layer that does so runs in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import BatchingError

DEFAULT = torch.default_generator
_ROOMS = (torch, torch.random)  # where Python finds it
_state = threading.local()  # of each thread: whether it is refused
_lock = threading.Lock()
_passes = 0  # how many threads are refused it now


class _Refusing:
    """Stands in its place, for all threads; only those in which models run at once are refused."""

    def __getattr__(self, name: str) -> Any:
        if getattr(_state, "is_refused", False):
            raise BatchingError("it seeds or looks at torch's random generator, which is another one for each model")
        return getattr(DEFAULT, name)


_STAND_IN = _Refusing()


@contextmanager
def refused(is_refused: bool = True) -> Iterator[None]:
    """Refuse the default generator to this thread in a `with` block, or allow it again."""
    before = getattr(_state, "is_refused", False)
    _switch(is_refused)
    try:
        yield
    finally:
        _switch(before)


def _switch(is_refused: bool) -> None:
    global _passes
    with _lock:
        _passes += is_refused - getattr(_state, "is_refused", False)
        _state.is_refused = is_refused
        for room in _ROOMS:
            room.default_generator = _STAND_IN if _passes else DEFAULT
