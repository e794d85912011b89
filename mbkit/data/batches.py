"""Batches whose order depends on nothing but a seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..common.checks import check_seeds, whole_number


class Batches:
    """Walks over a data set in batches; the order of epoch e is a pure function of (seed, e).

    Each `iter()` is the next epoch, as with a DataLoader; `set_epoch(e)` says which one the next `iter()` is. Unlike a
    DataLoader's, the order comes from a generator of its own: it neither reads nor moves torch's or numpy's global
    ones, so a model's random draws never change the data it sees. Batches are gathered on the data's device.

    With one seed per model, or subsets, each model has batches of its own, `[M, B, ...]`, for a ModelBatch with
    `shared_input=False`: model m sees what `Batches(inputs[subsets[m]], targets[subsets[m]], ..., seed=seed[m])` shows
    it alone. Nothing but the M batches is copied: each is one gather from the one data set.

    Args:
        inputs: `[N, ...]`.
        targets: `[N, ...]`, on the same device.
        batch_size: B; an epoch's last batch is smaller where B does not divide the number of examples.
        seed: what the orders are drawn from, 0 or more: one for all models, or M.
        shuffle: without it every epoch has the data's (or the subsets') own order.
        transform: applied to each batch of inputs `[B, ...]`, e.g. to turn uint8 into normalized floats. Where each
            model has its own batch it is called once, with `[M * B, ...]`.
        drop_last: leave out a smaller last batch.
        subsets: `[M, n]` of int64, the examples that each model trains on; it may name one several times.

    Raises:
        TypeError: seeds that are no whole numbers, or subsets that are no int64 tensor `[M, n]`.
        ValueError: inputs and targets of different lengths or devices, sizes that leave no batch, another number of
            seeds than of subsets, or examples that are not in the data.

    Example:
        >>> batches = Batches(torch.arange(5.0), torch.arange(5), batch_size=2)
        >>> [len(x) for x, y in batches]
        [2, 2, 1]
        >>> torch.equal(batches.order(3), batches.order(3)), torch.equal(batches.order(3), batches.order(4))
        (True, False)

        Bagging: 4 models, each on its own 5 draws with repeats; and 5 folds, model m training on all but fold m.

        >>> bags = torch.randint(5, (4, 5))
        >>> next(iter(Batches(torch.arange(5.0), torch.arange(5), 2, seed=range(4), subsets=bags)))[0].shape
        torch.Size([4, 2])
        >>> folds = torch.randperm(100).view(5, 20)
        >>> torch.stack([torch.cat([*folds[:m], *folds[m + 1 :]]) for m in range(5)]).shape
        torch.Size([5, 80])
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        seed: int | Sequence[int] = 0,
        shuffle: bool = True,
        transform: Callable[[Tensor], Tensor] | None = None,
        drop_last: bool = False,
        subsets: Tensor | None = None,
    ) -> None:
        if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets) or len(inputs) == 0:
            got = f"shapes {list(inputs.shape)} and {list(targets.shape)}"
            raise ValueError(f"Expected inputs and targets with one entry per example, got {got}: pass as many.")
        if inputs.device != targets.device:
            raise ValueError(f"Expected data on one device, got {inputs.device} and {targets.device}: move one.")
        size = len(inputs) if subsets is None else _check_subsets(subsets, len(inputs))
        whole_number(batch_size, "batch_size")
        if drop_last and batch_size > size:
            raise ValueError(f"Expected a batch_size of at most {size} with drop_last, got {batch_size}: pass less.")
        several = isinstance(seed, Iterable)
        seeds = list(seed) if several else [seed]
        self._seeds = check_seeds(seeds, len(subsets) if several and subsets is not None else len(seeds) or 1)
        self._subsets = None if subsets is None else subsets.cpu()
        self._shared = subsets is None and not several
        self.inputs, self.targets, self.transform = inputs, targets, transform
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self._size, self._epoch = size, 0

    def __len__(self) -> int:
        full, rest = divmod(self._size, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Make the next `iter()` walk in the order of `epoch` (0 is the first)."""
        self._epoch = whole_number(epoch, "epoch", least=0)

    def order(self, epoch: int) -> Tensor:
        """Return the examples in the order of `epoch`: `[N]`, or one row per model, `[M, n]`; int64, on the CPU."""
        places = np.empty((len(self._seeds), self._size), dtype=np.int64)
        for row, seed in zip(places, self._seeds, strict=True):
            row[:] = np.arange(self._size)
            if self.shuffle:
                # numpy keeps the pair apart in 128 bits; torch's CPU generator has 32, and seed + epoch would repeat.
                np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,))).shuffle(row)
        order = torch.from_numpy(places)
        if self._subsets is not None:
            order = self._subsets.gather(1, order.expand(len(self._subsets), -1))
        return order[0] if self._shared else order

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self._epoch = self._epoch, self._epoch + 1  # here and not at the first next(): this is when it begins
        return self._walk(epoch)

    def _walk(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(epoch).to(self.inputs.device)
        for chosen in order.split(self.batch_size, dim=-1)[: len(self)]:
            places = chosen.flatten()
            x = self.inputs.index_select(0, places)  # a copy even unshuffled: in-place layers must not edit the data
            x, y = (self.transform(x) if self.transform else x), self.targets.index_select(0, places)
            yield tree_map_only(Tensor, lambda t, shape=chosen.shape: t.unflatten(0, shape), (x, y))


def _check_subsets(subsets: Any, num_examples: int) -> int:
    """Return n."""
    if not isinstance(subsets, Tensor) or subsets.dtype != torch.int64 or subsets.ndim != 2:
        got = f"{subsets.dtype} {list(subsets.shape)}" if isinstance(subsets, Tensor) else type(subsets).__name__
        told = f"Expected subsets as an int64 tensor [M, n], got {got}: stack one row of indices per model, all of one"
        raise TypeError(f"{told} length: cut longer ones, or let shorter ones repeat examples.")
    if subsets.numel() == 0 or subsets.min() < 0 or subsets.max() >= num_examples:
        got = f"{subsets.min()} to {subsets.max()}" if subsets.numel() else f"the shape {list(subsets.shape)}"
        raise ValueError(f"Expected subsets that name examples from 0 to {num_examples - 1}, got {got}.")
    return subsets.shape[1]
