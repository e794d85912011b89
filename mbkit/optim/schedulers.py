"""One learning rate scheduler per model, over one optimizer of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from ..common.checks import per_model
from .base import BatchOptimizer

__all__ = ["ModelOptimizer", "ModelSchedulers"]


class ModelOptimizer(torch.optim.Optimizer):
    """What model m's scheduler takes for its optimizer: the batch's optimizer, seen as if it had model m's groups only.

    Args:
        optimizer: the optimizer of the batch.
        m: the model.
    """

    def __init__(self, optimizer: BatchOptimizer, m: int) -> None:
        # Without torch's own __init__: it has no parameters, and its groups are somebody else's.
        self.whole, self._m = optimizer, m

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The live groups: loading a state replaces the optimizer's, so they are looked up each time."""
        return self.whole.groups_of(self._m)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's own."""
        return self.whole.defaults

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
        super().__init__(make(ModelOptimizer(optimizer, m), **config) for m, config in enumerate(configs))

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
