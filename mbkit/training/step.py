"""How a training step is made: all models at once, in chunks of models, one by one, or as one compiled function.

Whatever is chosen, the models end up the same, to rounding. What is chosen by itself is measured on real steps.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..batch.freeze import stop_nonfinite
from ..batch.targets import TargetForms
from ..common.machine import keep_pages
from ..vmap import has_grad_hooks
from .chunks import Chunks, backward_at_once
from .one_by_one import OneByOne

__all__ = ["Stepper", "batch_step", "check_chunk_size"]

_CACHE = 4 << 20  # bytes kept for the backward pass from which on cutting a batch can pay
_SMALL = 1 << 17  # bytes that a model keeps, below which nothing is tried: all models at once are fastest
_FEW = 3  # unless they are so few that vmap costs more than it saves: then one by one
_TRIALS = 3  # timed steps of each way; one where it takes seconds, which a moment's noise does not change
_SIZES = (32, 16, 8, 4)


def batch_step(
    batch: Any,
    optimizer: Any,
    x: Any,
    y: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    max_norm: float | Sequence[float] | None = None,
    shared_targets: bool | TargetForms | None = None,
    on_nonfinite: str | None = None,
    chunks: Chunks | OneByOne | None = None,
) -> tuple[Tensor, Any]:
    """Make one update of all models; return the losses [M] and the outputs from before it, detached."""
    optimizer.zero_grad()
    backward = partial(backward_at_once, batch) if chunks is None else chunks.backward
    losses, outputs = backward(x, y, loss_fn, TargetForms.made_of(shared_targets))
    if on_nonfinite is not None:
        stop_nonfinite(batch, losses, on_nonfinite)
    if max_norm is not None:
        batch.clip_grad_norm_(max_norm)
    optimizer.step()
    return losses, outputs


def check_chunk_size(chunk_size: Any) -> None:
    """Refuse what is no chunk size.

    Raises:
        TypeError, ValueError: neither "auto", None nor a positive whole number.
    """
    if chunk_size in ("auto", None):
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"Expected chunk_size 'auto', None or a whole number, got {chunk_size!r}: pass 1 or more.")
    if chunk_size < 1:
        raise ValueError(f"Expected a chunk_size of at least 1, got {chunk_size}: pass 1 or more.")


class Stepper:
    """Makes a run's steps, in a way that it is told or finds out.

    Args:
        batch, optimizer, loss_fn, max_norm, shared_targets, on_nonfinite: as for `batch_step`.
        chunk_size: how many models are trained at once; None for all; "auto" to choose by memory and by the clock.
        compile: make each step as one compiled function, if that can be.

    Attributes:
        how: in words, how the last step was made.

    Raises:
        ValueError: a batch without parameters.
    """

    def __init__(
        self,
        batch: Any,
        optimizer: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        max_norm: float | Sequence[float] | None = None,
        shared_targets: bool | None = None,
        on_nonfinite: str | None = None,
        chunk_size: int | str | None = "auto",
        compile: bool = False,
    ) -> None:
        weight = next(batch.parameters(), None)
        if weight is None:
            raise ValueError("Expected models with parameters, got a batch without any: there is nothing to train.")
        self.batch, self.optimizer = batch, optimizer
        self._rest = (loss_fn, max_norm, TargetForms(shared_targets), on_nonfinite)
        self._compiled = None
        if compile:
            from .compiled import CompiledStep  # its imports take a second, and few runs need them

            self._compiled = CompiledStep(batch, optimizer, *self._rest)
        self._choice = _Choice(batch) if chunk_size == "auto" else None
        size = batch.num_models if chunk_size is None else chunk_size
        self._chunks = None if chunk_size == "auto" or size >= batch.num_models else Chunks(batch, size)
        self.how = ""
        if weight.device.type == "cpu":
            keep_pages()

    @property
    def settled(self) -> bool:
        """Whether the way to make the steps has been chosen."""
        return self._compiled is not None or self._choice is None or self._choice.settled

    def step(self, x: Any, y: Any) -> tuple[Tensor, Any]:
        """Make one update of all models; return the losses [M] and the outputs from before it, detached."""
        if self._compiled is not None:
            made = self._compiled.attempt(x, y)
            if made is not None:
                self.how = "compiled"
                return made
            reason, self._compiled = self._compiled.reason, None
            warnings.warn(f"compile=True: the steps run uncompiled, because {reason}.", stacklevel=5)
        if self._choice is None:
            chunks, settle = self._chunks, None
        else:
            chunks, settle = self._choice.next()
        self.how = _words(chunks)
        start = time.perf_counter()
        made = batch_step(self.batch, self.optimizer, x, y, *self._rest, chunks)
        if settle is not None:
            _wait(made[0])
            settle(time.perf_counter() - start)
        return made


def _words(chunks: Chunks | OneByOne | None) -> str:
    if chunks is None:
        return "all models at once"
    if isinstance(chunks, OneByOne):
        return "one by one"
    return f"in chunks of {chunks.size}" if chunks.size else "in chunks"


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class _Choice:
    """Finds the fastest way by trying each for a few steps, largest chunks first, for as long as smaller ones gain.

    The first step tells how much memory a model's activations take. Small models go all at once, or one by one if there
    are no more than three, without a trial and so always to the same bits; where all activations fit into the cache,
    chunks are not tried.
    """

    def __init__(self, batch: Any) -> None:
        self.best: Chunks | OneByOne | None = None
        if batch.num_models <= _FEW and OneByOne.fits(batch):
            self.best = OneByOne(batch)
        elif batch.num_models > 1 and not any(map(has_grad_hooks, batch.parameters())):
            self.best = Chunks(batch)
        self._batch = batch
        self._ways: list[Chunks | OneByOne | None] = []  # those still to be tried
        self._times: list[float] = []
        self._record: float | None = None  # the best way's seconds a step
        self._measured = self.best is None

    def next(self) -> tuple[Chunks | OneByOne | None, Callable[[float], None] | None]:
        """Return the way for the next step, and what wants to know how long it took, if anything."""
        if not self._measured:
            return self.best, self._measure
        return (self._ways[0], self._settle) if self._ways else (self.best, None)

    @property
    def settled(self) -> bool:
        return self._measured and not self._ways

    def _measure(self, seconds: float) -> None:
        batch, each = self._batch, self.best.bytes_each
        self._measured = True
        if isinstance(self.best, OneByOne):
            if each < _SMALL:
                return
            self.best = Chunks(batch)
            self.best.bytes_each = each
            self.best.size = self.best.largest(next(batch.parameters()).device)
        largest = self.best.size
        self.best = None if largest == batch.num_models else self.best
        if each < _SMALL:
            return
        sizes = [size for size in _SIZES if size < largest] if each * batch.num_models > _CACHE else []
        alone = [OneByOne(batch)] if OneByOne.fits(batch) else []
        self._ways = [self.best, *(Chunks(batch, size) for size in sizes), *alone]

    def _settle(self, seconds: float) -> None:
        self._times.append(seconds)
        hopeless = self._record is not None and len(self._times) > 1 and seconds > 1.5 * self._record
        trials = _TRIALS if seconds < 2 else 1
        if len(self._times) <= trials and not hopeless:  # the first step of each way is for warm-up
            return
        found, way = min(self._times[1:]), self._ways.pop(0)
        self._times = []
        if self._record is None or found < 0.97 * self._record:
            self.best, self._record = way, found
        elif found > 1.1 * self._record:
            self._ways.clear()  # still smaller chunks are slower still
