"""Batches whose order depends on nothing but a seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batches"]


class Batches:
    """Walks over a data set in batches; the order of epoch e is a pure function of (seed, e).

    Each `iter()` is the next epoch, as with a DataLoader; `set_epoch(e)` says which one the next `iter()` is. Unlike a
    DataLoader's, the order comes from a generator of its own: it neither reads nor moves torch's or numpy's global
    ones, so a model's random draws never change the data it sees. Batches are gathered on the data's device.

    Args:
        inputs: `[N, ...]`.
        targets: `[N, ...]`, on the same device.
        batch_size: B; an epoch's last batch is smaller where B does not divide N.
        seed: what the orders are drawn from, 0 or more.
        shuffle: without it every epoch has the data's own order.
        transform: applied to each batch of inputs, e.g. to turn uint8 into normalized floats.
        drop_last: leave out a smaller last batch.

    Raises:
        ValueError: inputs and targets of different lengths or devices, or sizes that leave no batch.

    Example:
        >>> batches = Batches(torch.arange(5.0), torch.arange(5), batch_size=2)
        >>> [len(x) for x, y in batches]
        [2, 2, 1]
        >>> torch.equal(batches.order(3), batches.order(3)), torch.equal(batches.order(3), batches.order(4))
        (True, False)
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        transform: Callable[[Tensor], Tensor] | None = None,
        drop_last: bool = False,
    ) -> None:
        if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets) or len(inputs) == 0:
            raise ValueError(
                f"Expected inputs and targets with one entry per example, got shapes {list(inputs.shape)} "
                f"and {list(targets.shape)}: give both the same first dimension."
            )
        if inputs.device != targets.device:
            raise ValueError(f"Expected data on one device, got {inputs.device} and {targets.device}: move one.")
        most = len(inputs) if drop_last else float("inf")
        if not _is_whole(batch_size) or not 1 <= batch_size <= most:
            at_most = f" and at most {most} with drop_last" if drop_last else ""
            raise ValueError(f"Expected a whole batch size of at least 1{at_most}, got {batch_size!r}.")
        if not _is_whole(seed) or seed < 0:
            raise ValueError(f"Expected a whole number of at least 0 as seed, got {seed!r}.")
        self.inputs, self.targets, self.transform = inputs, targets, transform
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self._epoch = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.inputs), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Make the next `iter()` walk in the order of `epoch` (0 is the first)."""
        if not _is_whole(epoch) or epoch < 0:
            raise ValueError(f"Expected a whole number of at least 0 as epoch, got {epoch!r}.")
        self._epoch = epoch

    def order(self, epoch: int) -> Tensor:
        """Return the indices of all examples in the order of `epoch`: `[N]`, int64, on the CPU."""
        if not self.shuffle:
            return torch.arange(len(self.inputs))
        # numpy keeps the pair apart in 128 bits; torch's CPU generator has 32, and seed + epoch would repeat itself.
        seeds = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        return torch.from_numpy(np.random.default_rng(seeds).permutation(len(self.inputs)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self._epoch = self._epoch, self._epoch + 1  # here and not at the first next(): this is when it begins
        return self._walk(epoch)

    def _walk(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(epoch).to(self.inputs.device)
        for chosen in order.split(self.batch_size)[: len(self)]:
            x = self.inputs.index_select(0, chosen)  # a copy even unshuffled: in-place layers must not edit the data
            yield (self.transform(x) if self.transform else x), self.targets.index_select(0, chosen)


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
