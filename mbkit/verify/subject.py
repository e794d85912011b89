"""What `compare` and `diagnose` need of a batch that somebody else wrote: a way to train it, and ways to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batch.model_batch import ModelBatch
from ..batch.targets import TargetForms
from ..optim import OptimizerFactory
from ..training.loop import make_schedule
from ..training.step import batch_step


class Subject(Protocol):
    """M models that somebody trains at once, seen from outside.

    Three methods may be missing: `learning_rate(m)`, model m's present learning rate (or None), without which schedules
    cannot be judged; `load(m, values)`, which writes model m's parameters; `walk(batches)`, which returns the batches
    in the order in which the batch really trains on them, where it has an order of its own.
    """

    def step(self, inputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Tensor]) -> Tensor | None:
        """Train all models one step, the schedule's included; return the losses [M] where they are at hand.

        `loss_fn` is one model's outputs and targets to one number: the experiments pass a scaled one.
        """

    def parameters(self, m: int) -> Mapping[str, Tensor]:
        """Return model m's parameters under the lone model's names; live views, so that shared memory can be seen."""

    def gradients(self, m: int) -> Mapping[str, Tensor]:
        """Return the gradients with which the last step updated model m, clipped if it clips."""

    def optimizer_state(self, m: int) -> Mapping[str, Mapping[str, Any]]:
        """Return what the optimizer remembers of model m: parameter's name to state's name to tensor."""


Recipe = Callable[[list[nn.Module], list[dict[str, Any]], list[int]], Any]  # models, configs, seeds -> Subject


class BatchSubject:
    """A `ModelBatch` and its optimizer, seen from outside.

    Args:
        batch: the batch; it is put into train mode.
        optimizer: from `OptimizerFactory`, or anything with zero_grad() and step() over the batch's parameters.
        schedule: an lr scheduler of the optimizer, stepped after each step.
        max_norm, shared_targets: as for `compare`.

    Example:
        >>> subject = BatchRecipe(torch.optim.SGD)([nn.Linear(2, 1) for _ in range(3)], [{"lr": 0.1}] * 3, [0, 1, 2])
        >>> tuple(subject.step(torch.ones(4, 2), torch.zeros(4, 1), nn.functional.mse_loss).shape)
        (3,)
        >>> tuple(subject.gradients(2)["weight"].shape), subject.learning_rate(2)
        ((1, 2), 0.1)
    """

    def __init__(
        self, batch: Any, optimizer: Any, max_norm: Any = None, schedule: Any = None, shared_targets: bool | None = None
    ) -> None:
        self.batch, self.optimizer, self.max_norm, self.schedule = batch, optimizer, max_norm, schedule
        self.forms = TargetForms(shared_targets)
        batch.train()

    def step(self, inputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Tensor]) -> Tensor:
        """Make one update, as `fit` does."""
        losses, _ = batch_step(self.batch, self.optimizer, inputs, targets, loss_fn, self.max_norm, self.forms)
        if self.schedule is not None:
            self.schedule.step()
        return losses

    def parameters(self, m: int) -> dict[str, Tensor]:
        """Views of model m's slices."""
        return {name: stacked.detach()[m] for name, stacked in self.batch.stacked_params.items()}

    def gradients(self, m: int) -> dict[str, Tensor]:
        """Views of model m's slices, of the parameters that have a gradient."""
        return {name: p.grad[m] for name, p in self.batch.stacked_params.items() if p.grad is not None}

    def optimizer_state(self, m: int) -> dict[str, dict[str, Tensor]]:
        """Views of model m's slices, whichever of mbkit's optimizers it is; of another one nothing can be read."""
        optimizer, stacked, size = self.optimizer, self.batch.stacked_params, self.batch.num_models
        if hasattr(optimizer, "lone"):  # one lone optimizer per model, over views or copies
            own = optimizer.lone[m]
            states = [own.state.get(view, {}) for view in own.param_groups[0]["params"]]
        else:
            every = [getattr(optimizer, "state", {}).get(p, {}) for p in stacked.values()]
            states = [{k: v[m] for k, v in own.items() if getattr(v, "shape", ())[:1] == (size,)} for own in every]
        return dict(zip(stacked, states, strict=True))

    def learning_rate(self, m: int) -> float | None:
        """Model m's, as its first group has it; None where the optimizer has no groups."""
        optimizer = self.optimizer
        if not hasattr(optimizer, "param_groups"):
            return None
        group = optimizer.groups_of(m)[0] if hasattr(optimizer, "groups_of") else optimizer.param_groups[m]
        return float(group["lr"])

    @torch.no_grad()
    def load(self, m: int, values: Mapping[str, Tensor]) -> None:
        """Write model m's parameters."""
        for name, value in values.items():
            self.batch.stacked_params[name][m].copy_(value)


@dataclass(frozen=True)
class BatchRecipe:
    """How a batch and its optimizer are made: by `build`, or as a `ModelBatch` with mbkit's optimizer.

    Args:
        optimizer_cls, max_norm, scheduler, shared_input, shared_targets, build: as for `compare`.
    """

    optimizer_cls: type[torch.optim.Optimizer]
    max_norm: Any = None
    scheduler: Callable[[Any], Any] | None = None
    shared_input: bool = True
    shared_targets: bool | None = None
    build: Recipe | None = None

    def __call__(self, models: list[nn.Module], configs: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Subject:
        """Return a fresh batch of these models, with these hyperparameters and seeds, as a `Subject`."""
        made = (self.build or self._own)(models, [dict(config) for config in configs], list(seeds))
        if not isinstance(made, tuple):
            return made
        batch, optimizer = made
        schedule = make_schedule(self.scheduler, optimizer)
        return BatchSubject(batch, optimizer, self.max_norm, schedule, self.shared_targets)

    def _own(self, models: list[nn.Module], configs: list[dict[str, Any]], seeds: list[int]) -> tuple[Any, Any]:
        batch = ModelBatch(models, self.shared_input, seeds=seeds)
        return batch, OptimizerFactory(self.optimizer_cls).create_optimizer(batch, configs)
