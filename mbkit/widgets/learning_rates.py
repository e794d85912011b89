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
from ..common.checks import whole_number
from ..common.random_streams import seeded
from ..data.batches import Batches
from ..data.load import demo_points
from ..figures import curves
from ..models import MLP, build_models
from ..optim import OptimizerFactory
from ..training.batched import train_steps
from .controls import OPTIMIZERS, WIDE, check_size, choice, known, log_range, nearest, objects, slider, spread
from .explorer import Explorer


class LearningRateExplorer(Explorer):
    """Train a grid of learning rates x seeds as one batch, live; pick out one model without training again.

    A click on a rate in the right panel picks it, too.

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
        mark: the rate and the seed of the model to pick out; the middle rate where absent.
        **hyperparameters: of the optimizer, such as momentum=0.9; another optimizer gets those that it has.

    Raises:
        ValueError: only one of build and batches; rates that are not 0 < lowest <= highest; a number out of its range.
        TypeError: a hyperparameter that the optimizer does not have.

    Example:
        >>> explorer = explore_learning_rates(num_rates=3, num_seeds=2, steps=20).wait()
        >>> tuple(explorer.loss.shape)
        (20, 6)
        >>> explorer.close()
    """

    opens = "explore_learning_rates"
    shows = (
        "Left: the loss of each model, step by step, dark for small learning rates and green for large ones. Right: "
        "its last loss against its learning rate."
    )
    note = curves.DIVERGED
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
        mark: tuple[float, int] | None = None,
        **hyperparameters: Any,
    ) -> None:
        given = objects(build, batches, loss_fn, F.cross_entropy)
        if build is None:
            with seeded(42):
                build, batches = lambda: MLP((20, 16, 16, 4)), Batches(*demo_points(500, 20, 4), batch_size=50)
        self._build, self._batches, self._loss_fn = build, batches, loss_fn
        self.steps, self._hyperparameters = whole_number(steps, "steps"), hyperparameters
        grid = {
            "rates": log_range(*rates),
            "num_rates": slider("num_rates", num_rates, 1, 32, shown="rates"),
            "num_seeds": slider("num_seeds", num_seeds, 1, 16, shown="seeds"),
        }
        check_size(num_rates * num_seeds, steps)
        rates = spread(*rates, num_rates)
        options = [(f"{rate:.3g}", rate) for rate in rates]
        index = num_rates // 2 if mark is None else nearest(rates, mark[0])
        marks = {
            "rate": ipw.SelectionSlider(options=options, index=index, description="show rate", style=WIDE),
            "seed": slider("show seed", 0 if mark is None else mark[1], 0, num_seeds - 1),
        }
        chosen = choice("optimizer", OPTIMIZERS, optimizer)
        known(optimizer, hyperparameters, all_of_them=True)
        super().__init__([grid, {"optimizer": chosen, **marks}], [*marks], given)

    @property
    def chosen(self) -> int:
        """The highlighted model: rates in the outer loop, seeds in the inner one."""
        return self.rate.index * self.num_seeds.value + self.seed.value

    def _named(self) -> dict[str, Any]:
        mark = {"mark": (self.rate.value, self.seed.value)}
        return {"steps": self.steps, **mark, **known(self.optimizer.value, self._hyperparameters)}

    def _changed(self, name: str) -> None:
        rates = spread(*self.rates.value, self.num_rates.value)
        options = [(f"{rate:.3g}", rate) for rate in rates]
        if list(self.rate.options) != options:
            self.rate.options = options
            self.rate.index = len(rates) // 2
        self.seed.max = self.num_seeds.value - 1
        super()._changed(name)

    def _clicked(self, across: float, down: float) -> None:
        panel = self.curves.right
        place, (low, high) = curves.place_in(panel, across, down), panel.get_xlim()
        if place is not None:
            self.rate.index = nearest([rate for _, rate in self.rate.options], low * (high / low) ** place[0])

    def _start(self, rates: tuple[float, float], num_rates: int, num_seeds: int, optimizer: str) -> Iterator[None]:
        check_size(num_rates * num_seeds, self.steps)
        rates = [rate for rate in spread(*rates, num_rates) for _ in range(num_seeds)]
        seeds = [*range(num_seeds)] * num_rates  # M = rates x seeds
        batch = ModelBatch(build_models(self._build, seeds), seeds=seeds)
        factory = OptimizerFactory(getattr(torch.optim, optimizer), known(optimizer, self._hyperparameters))
        updates = factory.create_optimizer(batch, lr=rates)
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
        cost = {"ms-a-model-and-step": f"{1e3 * seconds[len(seconds) // 2] / loss.shape[1]:.3g}"}
        return {"step": len(loss), "models": loss.shape[1], "diverged": lost, **marked, **cost}


explore_learning_rates = LearningRateExplorer
