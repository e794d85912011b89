"""Defects planted on purpose, to learn from and to test `diagnose` with.

Each fault has a name in `FAULTS`; `plant` makes a recipe for a batch that has it. None of them is exported by `mbkit`:
whoever wants one has to write `mbkit.faults`.

Two pairs cannot be told apart by anybody, because the one leaves nothing for the other to act on: in eval mode no
random mask is drawn ("other-mode" hides "other-masks"), and a gradient in shared memory is overwritten by another
model's ("shared-memory" hides a "wrong-gradient" in the very same parameter).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .model_batch import ModelBatch
from .plants import plant

__all__ = ["FAULTS", "StaleGradientOptimizer", "plant"]

# The name under which each fault is planted and reported -> what is wrong.
FAULTS: dict[str, str] = {
    "stale-gradients": "zero_grad() misses the stacked gradients, so each step adds to those of all earlier steps",
    "other-weights": "the batch is built without seeding again, so it starts from other initial weights",
    "other-order": "the batch reads its data without seeding again, so it sees other batches",
    "other-masks": "the batch draws other random numbers than its models alone, so dropout takes out other units",
    "other-mode": "the batch is in eval mode where its models alone are in train mode, or the other way round",
    "wrong-gradient": "the batch computes another gradient than autograd does for the model alone",
    "mean-loss": "the loss is averaged over the M models and not added up, so every gradient is divided by M",
    "clipped-across-models": "all models' gradients are clipped by one common norm, not each model's by its own",
    "setting-of-model-0": "model 0's setting is used for all models",
    "shared-optimizer-state": "what the optimizer remembers of one model is mixed with another model's",
    "leaking-update": "a part of one model's update is added to another model's parameters",
    "shared-memory": "numbers of different models lie in the same memory, so that writing one changes the other",
    "schedule-stepped-M-times": "the schedule is stepped once a model in each step, M times as fast as alone",
}


class StaleGradientOptimizer:
    """An optimizer that never clears the gradients it steps with: the published demo's defect, on purpose.

    It keeps a copy of every model's parameters and gives those copies to a `torch.optim` optimizer. A step copies the
    stacked gradients to the copies, updates the copies, and copies the result back. All of that is right. But
    `zero_grad` is the inner optimizer's: it clears the gradients of the *copies*, which the next step overwrites
    anyway, and not the *stacked* gradients, into which `backward` adds. Step 1 is therefore right, and step t follows
    the sum of t gradients. Nothing raises, the loss falls, and the accuracy looks plausible.

    Args:
        batch: the M models; their stacked parameters are changed in place by `step`.
        optimizer_cls: a `torch.optim` class that steps without a closure.
        configs: M dicts of hyperparameters, one per model.

    Raises:
        ValueError: another number of configs than M.

    Example:
        >>> batch = ModelBatch([nn.Linear(1, 1, bias=False) for _ in range(2)])
        >>> optimizer = StaleGradientOptimizer(batch, torch.optim.SGD, [{"lr": 0.1}, {"lr": 0.2}])
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     batch(torch.ones(1, 1)).sum().backward()  # the gradient is 1, three times
        >>> batch.stacked_params["weight"].grad.flatten()
        tensor([3., 3.])

    Follows the optimizer with which the library `modelbatch` printed its demo's table; written anew.
    """

    def __init__(
        self, batch: ModelBatch, optimizer_cls: type[torch.optim.Optimizer], configs: Sequence[Mapping[str, Any]]
    ) -> None:
        if len(configs) != batch.num_models:
            raise ValueError(
                f"Expected {batch.num_models} configs (one per model), got {len(configs)}: pass a list of "
                f"{batch.num_models} dicts."
            )
        self.batch = batch
        self.copies = [
            [nn.Parameter(stacked.detach()[m].clone()) for stacked in batch.stacked_params.values()]
            for m in range(batch.num_models)
        ]
        groups = [{"params": copies, **config} for copies, config in zip(self.copies, configs, strict=True)]
        self.optimizer = optimizer_cls(groups)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group a model, over the copies."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the copies only. This is the fault: `batch.zero_grad()` is missing here."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self) -> None:
        """Copy the stacked gradients to the copies, update the copies, copy the result back."""
        stacked_params = list(self.batch.stacked_params.values())
        for m, copies in enumerate(self.copies):
            for copy, stacked in zip(copies, stacked_params, strict=True):
                copy.grad = None if stacked.grad is None else stacked.grad[m].clone()
        self.optimizer.step()
        for m, copies in enumerate(self.copies):
            for copy, stacked in zip(copies, stacked_params, strict=True):
                stacked[m] = copy
