"""The explorer of learning rates x seeds, for the demo's networks or for your own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as ipw
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch.model_batch import ModelBatch
from ..common.random_streams import seeded
from ..data.load import Batches, demo_points
from ..figures import curves
from ..models import MLP, build_models
from ..optim import OptimizerFactory
from ..training.batched import train_steps
from .explorer import WIDE, log_range, slider, spread
from .grid import GridExplorer, check_size

__all__ = ["LearningRateExplorer", "explore_learning_rates"]


class LearningRateExplorer(GridExplorer):
    """Train a grid of learning rates x seeds as one batch, live; sliders pick out one model without training again.

    Args:
        build: makes one model, drawing its weights from torch's default generator, which is seeded before each call;
            a small classifier of the demo's points where absent.
        batches: an iterable of (inputs, targets), as for `fit`.
        loss_fn: one model's outputs and targets to one number.
        rates: the lowest and the highest learning rate; those between are evenly spaced on a log scale.
        num_rates: how many rates, 1 to 32. num_seeds: how many models of each, 1 to 16, seeded 0, 1, 2, ... M is their
            product.
        optimizer: the name of a class of `torch.optim`.
        steps: how many updates are made.
        **hyperparameters: of the optimizer, such as momentum=0.9.

    Raises:
        ValueError: only one of build and batches; rates that are not 0 < lowest <= highest; a number out of its range.

    Example:
        >>> explorer = explore_learning_rates(num_rates=3, num_seeds=2, steps=20).wait()
        >>> tuple(explorer.loss.shape)
        (20, 6)
        >>> explorer.close()
    """

    curves: curves.LearningRates
    seconds: list[float]  # a step of all models
    loss = torch.empty(0, 0)  # [steps made, M]

    def __init__(
        self,
        build: Callable[[], nn.Module] | None = None,
        batches: Any = None,
        *,
        loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
        rates: tuple[float, float] = (0.001, 10.0),
        num_rates: int = 9,
        num_seeds: int = 4,
        optimizer: str = "SGD",
        steps: int = 100,
        **hyperparameters: Any,
    ) -> None:
        self._describe("explore_learning_rates", build, batches, optimizer, steps, hyperparameters)
        if build is None:
            with seeded(42):
                build, batches = lambda: MLP((20, 16, 16, 4)), Batches(*demo_points(500, 20, 4), batch_size=50)
        self._build, self._batches, self._loss_fn = build, batches, loss_fn
        self.rates = log_range("rates", *rates)
        self.num_rates = slider("num_rates", num_rates, 1, 32, shown="rates")
        self.num_seeds = slider("num_seeds", num_seeds, 1, 16, shown="seeds")
        check_size(num_rates * num_seeds, steps)
        self.rate = ipw.SelectionSlider(options=[0], description="show rate", style=WIDE)
        self.seed = slider("show seed", 0, 0, num_seeds - 1)
        marks = (self.rate, self.seed)
        super().__init__([(self.rates, self.num_rates, self.num_seeds), (self.optimizer, *marks)], marks, height=320)

    @property
    def settings(self) -> dict[str, Any]:
        """What the grid's controls say, as arguments of `explore_learning_rates`."""
        counts = {"num_rates": self.num_rates.value, "num_seeds": self.num_seeds.value}
        return {"rates": self.rates.value, **counts, "optimizer": self.optimizer.value}

    @property
    def done(self) -> int:
        """The steps made so far."""
        return len(self.loss)

    @property
    def chosen(self) -> int:
        """The highlighted model: rates in the outer loop, seeds in the inner one."""
        return self.rate.index * self.num_seeds.value + self.seed.value

    def _changed(self) -> None:
        rates = spread(*self.rates.value, self.num_rates.value)
        options = [(f"{rate:.3g}", rate) for rate in rates]
        if list(self.rate.options) != options:
            self.rate.options = options
            self.rate.index = len(rates) // 2
        self.seed.max = self.num_seeds.value - 1
        super()._changed()

    def _start(self, rates: tuple[float, float], num_rates: int, num_seeds: int, optimizer: str) -> Iterator[None]:
        check_size(num_rates * num_seeds, self.steps)
        rates = [rate for rate in spread(*rates, num_rates) for _ in range(num_seeds)]
        seeds = [*range(num_seeds)] * num_rates  # M = rates x seeds
        batch = ModelBatch(build_models(self._build, seeds), seeds=seeds)
        updates = OptimizerFactory(getattr(torch.optim, optimizer), self._named).create_optimizer(batch, lr=rates)
        chart, seconds, loss = curves.LearningRates(rates, self.steps), [], torch.empty(self.steps, len(rates))
        walk = train_steps(batch, updates, self._batches, self._loss_fn, self.steps)  # a walk has at least one step
        for done, step in enumerate(itertools.islice(walk, self.steps)):
            loss[done] = step.losses
            seconds.append(step.seconds)
            self.curves, self.seconds, self.loss = chart, seconds, loss[: done + 1]
            yield

    def _picture(self) -> bytes:
        self.curves.update(self.loss, min(self.chosen, self.loss.shape[1] - 1))
        return self.curves.frame()

    def _facts(self) -> dict[str, Any]:
        loss, seconds = self.loss, sorted(self.seconds)  # of one moment: the thread goes on
        lost = int(curves.diverged(loss, self.curves.window).sum())
        shown = f"{loss[-1, min(self.chosen, loss.shape[1] - 1)].item():.4g}"
        marked = {"rate": self.rate.label, "seed": self.seed.value, "loss": shown}
        usual = seconds[len(seconds) // 2] / loss.shape[1]
        cost = {"ms-a-model-and-step": f"{1e3 * usual:.3g}"}
        return {"step": len(loss), "models": loss.shape[1], "diverged": lost, **marked, **cost}


explore_learning_rates = LearningRateExplorer
