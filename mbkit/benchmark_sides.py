"""The two sides of a benchmark: the same steps by the same clock, alone and in the batch."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .alone import lone_step
from .loop import walk
from .machine import measure_peak_memory, synchronize
from .model_batch import ModelBatch
from .optim import OptimizerFactory
from .rng import OwnDraws
from .stepping import Stepper

__all__ = ["BLOCK", "Alone", "Batched", "Block", "blocks"]

BLOCK = 10  # steps that a model or the batch makes before it is another's turn

Block = list[tuple[Tensor, Tensor]]


class Side:
    """One of the two ways to train. It is built in the first block, so that its state counts as memory."""

    def __init__(self, models: list, optimizer_cls: Any, configs: list, seeds: list, device: torch.device):
        self._given = (models, optimizer_cls, configs, seeds)
        self._device = device
        self._columns: list[list[tuple[Tensor, float]]] = []  # what trains as one: loss and seconds, step by step
        self.sizes: list[int] = []  # B, step by step
        self.memory: int | None = None

    def train(self, block: Block, measure: bool) -> None:
        """Make the steps of one block."""
        self.sizes += [len(y) for _, y in block]
        if not measure:
            return self._train(block)
        with measure_peak_memory(self._device) as peak:
            self._build(*self._given)
            self._train(block)
        self.memory = peak.bytes

    def seconds(self) -> Tensor:
        """[steps, columns]"""
        return torch.tensor([[seconds for _, seconds in run] for run in self._columns], dtype=torch.float64).T

    def loss(self) -> Tensor:
        """[steps, M]"""
        return torch.cat([torch.stack([loss.view(-1) for loss, _ in run]) for run in self._columns], 1).cpu()

    def _clock(self, step: Callable[..., tuple[Tensor, Any]], *args: Any) -> tuple[Tensor, float]:
        synchronize(self._device)
        start = time.perf_counter()
        loss, _ = step(*args)
        synchronize(self._device)
        return loss, time.perf_counter() - start


class Alone(Side):
    def _build(self, models: list, optimizer_cls: Any, configs: list, seeds: list) -> None:
        self.models = copy.deepcopy(models)
        self._optimizers = [optimizer_cls(m.parameters(), **c) for m, c in zip(self.models, configs, strict=True)]
        self._draws = [OwnDraws(seed) for seed in seeds]
        self._columns = [[] for _ in models]

    def _train(self, block: Block) -> None:
        for model, optimizer, draws, run in zip(self.models, self._optimizers, self._draws, self._columns, strict=True):
            with draws.current():
                run += [self._clock(lone_step, model, optimizer, x, y, cross_entropy) for x, y in block]


class Batched(Side):
    def _build(self, models: list, optimizer_cls: Any, configs: list, seeds: list) -> None:
        self.batch = ModelBatch(models, seeds=seeds)
        optimizer = OptimizerFactory(optimizer_cls).create_optimizer(self.batch, configs)
        self._step = Stepper(self.batch, optimizer, cross_entropy).step  # as fit makes it
        self._columns = [[]]

    def _train(self, block: Block) -> None:
        self._columns[0] += [self._clock(self._step, x, y) for x, y in block]


def blocks(batches: Any, epochs: int, steps: int, warmup: int, device: torch.device) -> Iterator[Block]:
    """Cut the walk into the warm-up and then blocks of equal size."""
    pairs = itertools.chain.from_iterable(walk(batches, epoch, device) for epoch in range(epochs))
    pairs = itertools.islice(pairs, steps)
    block = list(itertools.islice(pairs, warmup or BLOCK))
    while block:
        yield block
        block = list(itertools.islice(pairs, BLOCK))
