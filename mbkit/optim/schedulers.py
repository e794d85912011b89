"""One learning rate scheduler per model, over one optimizer of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch.optim.lr_scheduler import MultiplicativeLR

from ..common.checks import model_numbers, per_model
from .base import BatchOptimizer

# What torch's schedulers keep for each entry of `param_groups`.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


class ModelOptimizer(torch.optim.Optimizer):
    """What model m's scheduler takes for its optimizer: the batch's optimizer, seen as if it had model m's groups only.

    Args:
        optimizer: the optimizer of the batch. m: the model.
    """

    def __init__(self, optimizer: BatchOptimizer, m: int) -> None:
        # Without torch's own __init__: it has no parameters, and its groups are somebody else's.
        self.whole, self._m = optimizer, m
        self.param_groups, self.defaults = optimizer.groups_of(m), optimizer.defaults

    @property
    def _opt_called(self) -> bool:  # schedulers warn when they are stepped before the optimizer was
        return getattr(self.whole, "_opt_called", False)

    def step(self, closure: Any = None) -> NoReturn:  # type: ignore[override]
        """Refuse: all models step together."""
        raise RuntimeError(f"This stands for model {self._m} in its scheduler: call step() on the batch's optimizer.")

    def __repr__(self) -> str:
        return f"ModelOptimizer(model {self._m} of {self.whole.num_models})"


class ModelSchedulers(list):
    """M schedulers, one per model: a list to loop over, and one object to call `step()` on.

    Args:
        optimizer: the optimizer of the batch.
        make: makes model m's scheduler of `(optimizer, **configs[m])`; a class or any function.
        configs: M dicts.
    """

    def __init__(self, optimizer: BatchOptimizer, make: Callable[..., Any], configs: Sequence[dict[str, Any]]) -> None:
        self.optimizer = optimizer
        self._views = [ModelOptimizer(optimizer, m) for m in range(len(configs))]
        super().__init__(make(view, **config) for view, config in zip(self._views, configs, strict=True))

    def step(self, metrics: Any = None) -> None:
        """Step every scheduler once.

        Args:
            metrics: for ReduceLROnPlateau: `[M]`, a list or a tensor with one number per model (or one for all).

        Raises:
            ValueError: another number of metrics than models.
        """
        if metrics is None:
            for scheduler in self:
                scheduler.step()
        else:
            for scheduler, metric in zip(self, per_model(metrics, len(self), "metrics"), strict=True):
                scheduler.step(metric)

    def get_last_lr(self) -> list[float]:
        """Return the learning rates that the schedulers set last, in the order of the optimizer's `param_groups`."""
        return [lr for scheduler in self for lr in scheduler.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Return the M schedulers' states."""
        return {"schedulers": [scheduler.state_dict() for scheduler in self]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned.

        Raises:
            ValueError: the state of another number of models.
        """
        states = state_dict["schedulers"]
        if len(states) != len(self):
            raise ValueError(f"Expected the states of {len(self)} schedulers (one per model), got {len(states)}.")
        for scheduler, state in zip(self, states, strict=True):
            scheduler.load_state_dict(state)

    def select(self, models: Iterable[int], optimizer: BatchOptimizer) -> ModelSchedulers:
        """Return the schedulers of some models, which go on from here; see `select_scheduler`."""
        chosen = ModelSchedulers(optimizer, MultiplicativeLR, [{"lr_lambda": _unchanged}] * optimizer.num_models)
        for i, m in enumerate(_checked(models, self.optimizer, optimizer)):
            chosen[i] = copy.deepcopy(self[m], {id(self.optimizer): optimizer, id(self._views[m]): chosen._views[i]})
        return chosen


def select_scheduler(scheduler: Any, models: Iterable[int], optimizer: BatchOptimizer) -> Any:
    """Return a copy of a scheduler that goes on with some of the models.

    The schedulers of several batches are merged by their states: make them by `create_lr_scheduler` for the merged
    optimizer, load `{"schedulers": [...]}` with the rows of their `state_dict()["schedulers"]`, one per model, and load
    the optimizer's state after them.

    Args:
        scheduler: one of torch's over an optimizer of a batch, or what `create_lr_scheduler` returned.
        models: the models' numbers.
        optimizer: the smaller optimizer, from `optimizer.select(models, batch)`.

    Raises:
        TypeError, IndexError: models that are not whole numbers, or that are not there.
        ValueError: an optimizer of another number of models.

    Example:
        >>> from mbkit import ModelBatch, OptimizerFactory
        >>> batch = ModelBatch([torch.nn.Linear(3, 1) for _ in range(4)])
        >>> optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=[0.5, 1.0, 2.0, 4.0])
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        >>> optimizer.step()
        >>> scheduler.step()
        >>> chosen = optimizer.select([3, 1], batch.select([3, 1]))
        >>> scheduler = select_scheduler(scheduler, [3, 1], chosen)
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [1.0, 0.25]
    """
    if isinstance(scheduler, ModelSchedulers):
        return scheduler.select(models, optimizer)
    numbers, old = _checked(models, scheduler.optimizer, optimizer), scheduler.optimizer
    MultiplicativeLR(optimizer, _unchanged)  # torch marks an optimizer's step when a first scheduler is made for it
    size = len(old.param_groups) // old.num_models
    chosen = copy.deepcopy(scheduler, {id(old): optimizer})
    _keep(chosen, [m * size + g for m in numbers for g in range(size)])
    return chosen


def _checked(models: Iterable[int], old: BatchOptimizer, new: BatchOptimizer) -> list[int]:
    numbers, count = model_numbers(models, old.num_models), new.num_models
    if count != len(numbers):
        raise ValueError(f"Expected an optimizer of {len(numbers)} models, got one of {count}: select it first.")
    return numbers


def _keep(scheduler: Any, entries: Sequence[int]) -> None:
    """Keep some entries of what a scheduler, and those that it is composed of, have for each parameter group."""
    for name, value in vars(scheduler).items():
        if name in _PER_GROUP and isinstance(value, list):
            setattr(scheduler, name, [value[i] for i in entries])
        elif name == "_schedulers":
            for part in value:
                _keep(part, entries)


def _unchanged(_: int) -> float:
    return 1.0
