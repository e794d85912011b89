"""Building M models straight into their stacks: beside those there is one model at a time, or a few small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import check_seeds
from ..models import each_built
from ..vmap import copy_module
from .stack import Stacks
from .validate import AlikeModels

# Small models are held up to 32 at once, for as many bytes: to stack each by itself takes half as long again, and of
# 256 the checks find little in the processor's caches.
_MOST, _MOST_BYTES = 32, 1 << 20


class CanBuild:
    """The part of a ModelBatch that builds its models."""

    @classmethod
    def build(cls, factory: Callable[[], nn.Module], seeds: Iterable[int], *args: Any, **kwargs: Any) -> Any:
        """Return a batch of one model per seed, in less memory and time than from a list of them.

        It is the batch that `ModelBatch([factory() for each seed, after torch.manual_seed(seed)], seeds=seeds)` is, but
        each model goes into the stacks as soon as it is built. Beside the batch there is one model, or up to 32 small
        ones. Torch's generator stays where it was.

        Args:
            factory: builds one model, drawing its weights from torch's default generators.
            seeds: M whole numbers, which also become the batch's seeds.
            *args, **kwargs: as for `ModelBatch`.

        Raises:
            TypeError, ValueError: as for `ModelBatch`.

        Example:
            >>> from mbkit import ModelBatch
            >>> batch = ModelBatch.build(lambda: nn.Linear(3, 2), range(1000))
            >>> _ = torch.manual_seed(7)
            >>> torch.equal(batch[7].weight, nn.Linear(3, 2).weight)
            True
        """
        seeds = list(seeds) if isinstance(seeds, Iterable) else []
        if not seeds:
            raise TypeError("Expected at least one seed, got none: pass range(M) for M models.")
        seeds = check_seeds(seeds, len(seeds))
        with closing(each_built(factory, seeds)) as models:
            made = _built(models, len(seeds))
        return cls(made, *args, seeds=seeds, **kwargs)


def _built(models: Iterator[nn.Module], num_models: int) -> Stacks:
    first = next(models)
    alike = AlikeModels(first)
    stacks = Stacks(first, num_models, alike.settings)
    stacks.write([first])
    blank = {id(t): _blank(t) for t in (*first.parameters(), *first.buffers()) if t.layout is torch.strided}
    size = min(_MOST, max(1, _MOST_BYTES // max(1, sum(t.nbytes for t in blank.values()))))
    # The others are compared with a copy that takes no memory; `_apply` has an LSTM list its weights anew.
    first = copy_module(first, blank, alone=True)._apply(lambda tensor: tensor)
    alike.compare_with(first)
    while some := [alike.add(model) for model in islice(models, size)]:
        stacks.write(some)
        del some
    return stacks.finish(first)


def _blank(tensor: Tensor) -> Tensor:
    blank = tensor.detach().new_empty(()).expand(tensor.shape)
    return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
