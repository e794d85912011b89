"""The same batches for each of several models that train alone, whatever the models draw in between."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .loop import Pairs, first_tensor, walk

__all__ = ["Replay"]


class Replay:
    """The same batches for each of several models, whatever the models draw in between.

    A DataLoader that shuffles draws from torch's global generator, as dropout does, so a model trained alone
    would change the order of its own data. Here the data draws from a state of its own, which starts for each model
    where the global generators (torch's on the CPU, Python's, NumPy's) and those of the loader and its sampler stood
    when the `with` block was entered. When it is left, all stand as if the data had been drawn once, and those of the
    models' accelerators as if nothing had been drawn.
    """

    def __init__(self, batches: Pairs, models: Sequence[nn.Module]):
        self._batches = batches
        parameters = [p for model in models for p in model.parameters()]
        self._device = parameters[0].device if parameters else torch.device("cpu")
        gpus = {p.device for p in parameters if p.is_cuda}  # torch.manual_seed seeds these, too
        self._fork = torch.random.fork_rng(sorted(gpu.index for gpu in gpus))
        self._first: tuple[Any, Any] | None = None

    def __enter__(self) -> Replay:
        self._generators = [(g, g.get_state()) for g in _generators(self._batches)]
        self._python, self._numpy = random.getstate(), numpy.random.get_state()
        self._start = self._now = torch.get_rng_state()
        self._fork.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
        torch.set_rng_state(self._now)

    def restart(self) -> None:
        """Begin again, for the next model; call it before seeding that model."""
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        self._now = self._start

    def epoch(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """Yield one epoch's (inputs, targets).

        Raises:
            ValueError: a model's very first batch is not the first model's: the data draws from what is not known here.
        """
        pairs, first = walk(self._batches, epoch, self._device), epoch == 0
        while True:
            with self.data_draws():
                pair = next(pairs, None)
            if pair is None:
                return
            if first:
                self._compare(pair)
                first = False
            yield pair

    @contextmanager
    def data_draws(self) -> Iterator[None]:
        """Draw in a `with` block, or in a decorated function, from the data's state: as all else but models does."""
        model = torch.get_rng_state()
        torch.set_rng_state(self._now)
        try:
            yield
        finally:
            self._now = torch.get_rng_state()
            torch.set_rng_state(model)

    def _compare(self, pair: tuple[Any, Any]) -> None:
        if self._first is None:
            self._first = tree_map_only(Tensor, Tensor.clone, pair)  # loaders may fill the same memory again
        elif not all(_same(a, b) for a, b in zip(pair, self._first, strict=True)):
            raise ValueError(
                "Expected each model to get the same batches, got another first batch than the model before: the data "
                "draws random numbers that cannot be drawn again; pass list(batches), or batches with a set_epoch."
            )


def _generators(batches: Any) -> list[torch.Generator]:
    """The torch.Generators that a loader, its samplers and its dataset hold, each once."""
    owners, found = [batches], {}
    for name in ("sampler", "batch_sampler", "dataset"):
        owners += [getattr(owner, name) for owner in list(owners) if getattr(owner, name, None) is not None]
    for owner in owners:
        for value in getattr(owner, "__dict__", {}).values():
            if isinstance(value, torch.Generator):
                found[id(value)] = value
    return list(found.values())


def _same(a: Any, b: Any) -> bool:
    """Whether the first tensors of two trees hold the same numbers, NaN being equal to NaN."""
    a, b = first_tensor(a), first_tensor(b)
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
