"""Where a run stands in its data: batches that can be gone on with in the middle of an epoch, in the same order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..common.random_streams import global_state, set_global_state, state_of
from .loop import Pairs, count_steps

_HOLDERS = ("sampler", "batch_sampler", "dataset", "transform", "transforms", "collate_fn")
_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


class PositionedBatches:
    """Somebody's batches, with the epoch and the number of batches drawn in it; `state()` can be loaded later.

    To go on in the middle of an epoch, the random generators are put back to where they were when it began, and the
    batches that were done are drawn again and dropped. These are the global generators of torch, Python and NumPy, and
    those that the batches, their samplers, datasets and transforms hold as attributes. What workers of a DataLoader
    draw depends on torch's generator only, unless they are persistent ones that draw from generators of their own.

    Args:
        batches: an iterable of pairs that can be walked through again.

    Attributes:
        epoch: the one that the next walk is, or the present one. step: how many batches were drawn in it.

    Example:
        >>> batches = PositionedBatches([(torch.ones(1), torch.ones(1))] * 3)
        >>> _ = next(iter(batches))
        >>> batches.epoch, batches.step
        (0, 1)
    """

    def __init__(self, batches: Pairs) -> None:
        self.batches, self.epoch, self.step = batches, 0, 0
        self._loaded: dict[str, Any] | None = None  # the state in the middle of an epoch where the next walk begins
        self._start = self._before = self._last = None  # the generators before the epoch and its last batch; that batch
        self.chunk_size: int | None = None  # how the steps on these batches were made

    def __getattr__(self, name: str) -> Any:
        if name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)  # set_epoch, sampler, …

    def at_end(self) -> None:
        """Called by who trains when an epoch is over and its scheduler's step is made."""

    @property
    def resumed(self) -> bool:
        """Whether the next walk begins in the middle of an epoch, where the loaded state says."""
        return self._loaded is not None

    def __len__(self) -> int:
        return len(self.batches) - (self.step if self.resumed else 0)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        if self.resumed:
            items = self._wound_on(self._loaded)
            self._loaded = None
        else:
            self.step, self._start = 0, self._generators()
            items = iter(self.batches)
        while True:
            before = self._generators()
            try:
                item = next(items)
            except StopIteration:
                break
            self._before, self._last = before, item
            self.step += 1
            yield item
        self.epoch, self.step = self.epoch + 1, 0

    def _wound_on(self, to: dict[str, Any]) -> Iterator[Any]:
        """Return an iterator over the batches that has drawn, and dropped, those of a saved run."""
        self._start = to["start"]
        self._set_generators(self._start)
        items = iter(self.batches)
        for i in range(1, to["step"] + 1):
            if i == to["step"]:
                self._set_generators(to["before"])
            item = next(items, None)
            if item is None or (i == to["step"] and _digest(item) != to["last"]):
                got = "no more batches" if item is None else "other numbers"
                told = f"Expected batch {i} of epoch {self.epoch} as in the saved run, got {got}: pass the same data"
                raise ValueError(f"{told}, in an order by seeds alone (of Batches, or a DataLoader's generator).")
        self._set_generators(to["now"])
        return items

    def state(self) -> dict[str, Any]:
        """Return where the walk is, for `load_state`; at an epoch's end it is the beginning of the next."""
        if self._loaded is not None:
            return {**self._loaded, "now": self._generators()}
        over = self.step == count_steps(self.batches, 1)
        here = {"epoch": self.epoch + over, "step": 0 if over else self.step, "now": self._generators()}
        if here["step"] > 0:
            here |= {"start": self._start, "before": self._before, "last": _digest(self._last)}
        return here

    def load_state(self, state: dict[str, Any]) -> None:
        """Let the next walk begin where `state()` was called, and put all generators to where they were then."""
        self.epoch, self.step = state["epoch"], state["step"]
        self._loaded = state if self.step > 0 else None
        self._set_generators(state["now"])

    def _generators(self) -> dict[str, Any]:
        own = {path: state_of(generator)[0]() for path, generator in _held(self.batches).items()}
        return {"own": own, **global_state()}

    def _set_generators(self, state: dict[str, Any]) -> None:
        held = _held(self.batches)
        if held.keys() != state["own"].keys():
            told = f"Expected batches with the random generators {sorted(state['own'])}, as in the saved run"
            raise ValueError(f"{told}, got {sorted(held)}: pass the same data.")
        set_global_state(state)
        for path, generator in held.items():
            state_of(generator)[1](state["own"][path])


def _held(batches: Any) -> dict[str, Any]:
    """Return the generators that a loader, its samplers, its dataset and their like hold, each once, by their paths."""
    owners, found, seen = [("", batches)], {}, set()
    for path, owner in owners:
        for name, value in getattr(owner, "__dict__", {}).items():
            is_generator = isinstance(value, _GENERATORS)
            if id(value) in seen or not (is_generator or name in _HOLDERS):
                continue
            seen.add(id(value))
            if is_generator:
                found[path + name] = value
            else:
                own = [value, *value] if type(value) in (list, tuple) and len(value) < 100 else [value]
                owners += [(f"{path}{name}.{i}." if i else f"{path}{name}.", part) for i, part in enumerate(own)]
    return found


def _digest(item: Any) -> str:
    """Return a checksum of the numbers in a batch."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(item):
        leaf = getattr(leaf, "data", leaf) if not isinstance(leaf, Tensor) else leaf  # a PackedSequence
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
