"""Does this optimizer train this batch, does this scheduler move this optimizer, and does either mix the models?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..batch.habits import warn_of_norms
from ..common.functions import depth_of_user
from ..common.random_streams import random_state
from .base import BatchOptimizer
from .schedulers import ModelOptimizer


def check_trains(optimizer: Any, batch: nn.Module) -> None:
    """Refuse an optimizer that holds none of the batch's parameters; warn of one that would mix the models.

    An optimizer of torch's over `batch.parameters()` trains each model as alone if its update works number by number.

    Args:
        optimizer: from OptimizerFactory, one of torch's, or anything without `param_groups`, of which nothing is known.
        batch: a ModelBatch.

    Raises:
        ValueError: training would change nothing.
    """
    name = getattr(optimizer, "optimizer_cls", type(optimizer)).__name__
    groups = getattr(optimizer, "param_groups", None)
    mine, create = {id(param) for param in batch.parameters()}, f"OptimizerFactory({name}).create_optimizer(batch, "
    if groups is None or not mine:
        return
    if any(id(param) in mine for group in groups for param in group["params"]):
        if isinstance(optimizer, BatchOptimizer):
            return
        warn_of_norms(optimizer, batch.num_models)
        if not all(group["params"] for group in groups):
            told = f"{name} has a group without parameters. If chosen by their dimensions: the batch's have one more"
            told += f", M. {create}groups=[{{'params': lambda name, p: p.ndim < 2, ...}}, ...]) shows them as alone."
            warnings.warn(told, stacklevel=depth_of_user())
        if isinstance(optimizer, torch.optim.Optimizer):
            _look_for_noise(optimizer, create)
        return
    told = f"Expected an optimizer of this batch's parameters, got {name} over others, so nothing would be trained"
    raise ValueError(f"{told}: after a new ModelBatch create it anew, by {create}...).")


def _look_for_noise(optimizer: torch.optim.Optimizer, create: str) -> None:
    """Warn in the first step if it draws random numbers: over `[M, ...]` these are not those of each model's stream."""

    def after(*_: Any) -> None:
        state = states.pop()
        if states:  # a step within a step, of a class that calls its parent's
            return
        for handle in handles:
            handle.remove()
        if not all(map(torch.equal, state, random_state())):
            told = f"{type(optimizer).__name__} draws random numbers for all models at once, so none has its own."
            warnings.warn(f"{told} {create}...) draws from each model's stream.", stacklevel=2)

    states: list[list[torch.Tensor]] = []
    before = optimizer.register_step_pre_hook(lambda *_: states.append(random_state()))
    handles = before, optimizer.register_step_post_hook(after)


def check_scheduler(scheduler: Any, optimizer: Any) -> None:
    """Refuse an lr scheduler of another optimizer. A scheduler that names no optimizer is left alone.

    Raises:
        ValueError: its steps would change no learning rate of `optimizer`.
    """
    of = getattr(scheduler, "optimizer", None)
    of = of.whole if isinstance(of, ModelOptimizer) else of
    groups = getattr(optimizer, "param_groups", None)
    if of is None or groups is None or of is optimizer or getattr(of, "param_groups", None) is groups:
        return
    name = type(scheduler[0] if isinstance(scheduler, Sequence) else scheduler).__name__
    told = f"Expected a scheduler of this optimizer, got {name} of another {type(of).__name__}, so no rate would change"
    raise ValueError(f"{told}: create it anew, or pass a function that does, lambda optimizer: {name}(optimizer, ...).")
