"""Sliders over the same pure functions as the static figures. Only here and in *explorer.py is ipywidgets known.

An explorer is a widget: the last line of a cell shows it. Its callbacks only post wishes to a `Worker`, whose thread
trains and draws; so a slider never hangs, and of many values the newest wins. On a page without a kernel the picture
stays, as a PNG. In notebooks leave a core to the browser: `torch.set_num_threads(max(1, os.cpu_count() - 1))`.
"""

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
from ..figures import curves, plots
from ..lessons import consistency
from ..lessons.demo_result import SWITCHES
from ..models import MLP
from ..optim import OptimizerFactory
from ..training.batched import train_steps
from .explorer import (
    OPTIMIZERS,
    WIDE,
    Explorer,
    choice,
    given,
    keywords,
    log_range,
    on_change,
    slider,
    spread,
)

__all__ = ["ConsistencyExplorer", "LearningRateExplorer", "explore_consistency", "explore_learning_rates"]


class ConsistencyExplorer(Explorer):
    """Show the demo trained alone and in the batch, with sliders for everything that could explain its table.

    Args:
        preset: "published", "quick" or "full".
        gradients: "stale" or "cleared". weights: "other" or "same". order: "other" or "same".
        **settings: of `consistency.Demo`, such as learning_rates, seed, optimizer.

    Raises:
        ValueError, TypeError: what `consistency.preset` and `consistency.run` refuse.

    Example:
        >>> explorer = explore_consistency(gradients="cleared", weights="same", order="same")
        >>> explorer.wait().outcome.verdict
        'CONSISTENT'
        >>> explorer.seed.value = 7  # as a hand would; the picture follows
        >>> explorer.wait().outcome.demo.seed
        7
        >>> explorer.close()
    """

    outcome: consistency.Outcome

    def __init__(
        self,
        preset: str = "published",
        gradients: str = "stale",
        weights: str = "other",
        order: str = "other",
        **settings: Any,
    ) -> None:
        demo = consistency.preset(preset, **settings)
        rates = demo.learning_rates
        self._given, self._others = ((min(rates), max(rates), len(rates)), rates), settings
        self.preset = choice("preset", list(consistency.PRESETS), preset)
        self.rates = log_range("learning rates", min(rates), max(rates))
        self.models = slider("models M", len(rates), 1, 6)
        self.seed = slider("seed", demo.seed, 0, 100)
        self.optimizer = choice("optimizer", OPTIMIZERS, demo.optimizer)
        switches = {"gradients": gradients, "weights": weights, "order": order}
        self.switches = {name: choice(name, SWITCHES[name], value) for name, value in switches.items()}
        rows = [(self.preset, self.optimizer), (self.rates, self.models, self.seed), (*self.switches.values(),)]
        super().__init__(rows, height=320)
        on_change(itertools.chain(*rows), self._changed)
        self._changed()

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, as arguments of `explore_consistency`."""
        shown = (*self.rates.value, self.models.value)
        rates = self._given[1] if shown == self._given[0] else spread(*shown)  # a list need not be evenly spaced
        chosen = {name: control.value for name, control in self.switches.items()}
        named = {"learning_rates": rates, "seed": self.seed.value, "optimizer": self.optimizer.value}
        return {"preset": self.preset.value, **chosen, **self._others, **named}

    @property
    def call(self) -> str:
        """The code that reproduces the picture."""
        settings = self.settings
        switches = keywords({name: settings.pop(name) for name in SWITCHES})
        demo = f"preset({settings.pop('preset')!r}, {keywords(settings)})"
        return f"plots.consistency(consistency.run(consistency.{demo}, {switches}))"

    def _start(self, preset: str, gradients: str, weights: str, order: str, **settings: Any) -> Iterator[None]:
        demo = consistency.preset(preset, **settings)
        for self.outcome in consistency.walk(demo, gradients, weights, order):
            yield

    def _picture(self) -> bytes:
        return plots.consistency(self.outcome).frame()

    def _facts(self) -> dict[str, Any]:
        outcome = self.outcome
        ends = {"step": len(outcome.parameter_difference), "largest-difference": f"{outcome.max_difference:.1%}"}
        return {**ends, "verdict": outcome.verdict, "faults": ", ".join(outcome.faults) or "none"}


explore_consistency = ConsistencyExplorer


class LearningRateExplorer(Explorer):
    """Train a grid of learning rates x seeds as one batch, live; sliders pick out one model without training again.

    Args:
        build: makes one model, drawing its weights from torch's default generator, which is seeded before each call;
            a small classifier of the demo's points where absent.
        batches: an iterable of (inputs, targets), as for `fit`.
        loss_fn: one model's outputs and targets to one number.
        rates: the lowest and the highest learning rate; those between are evenly spaced on a log scale.
        num_rates: how many rates. num_seeds: how many models of each, seeded 0, 1, 2, ... M is their product.
        optimizer: the name of a class of `torch.optim`.
        steps: how many updates are made.
        **hyperparameters: of the optimizer, such as momentum=0.9.

    Raises:
        ValueError: only one of build and batches.

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
        self._called = given(build, batches)
        if build is None:
            with seeded(42):
                build, batches = lambda: MLP((20, 16, 16, 4)), Batches(*demo_points(500, 20, 4), batch_size=50)
        self._build, self._batches = build, batches
        self._loss_fn, self._hyperparameters, self.steps = loss_fn, hyperparameters, steps
        self.rates = log_range("learning rates", *rates)
        self.num_rates = slider("rates", num_rates, 1, 32)
        self.num_seeds = slider("seeds", num_seeds, 1, 16)
        self.optimizer = choice("optimizer", OPTIMIZERS, optimizer)
        self.rate = ipw.SelectionSlider(options=[0], description="show rate", style=WIDE)
        self.seed = slider("show seed", 0, 0, num_seeds - 1)
        grid = (self.rates, self.num_rates, self.num_seeds, self.optimizer)
        super().__init__([grid[:3], (self.optimizer, self.rate, self.seed)], height=320)
        on_change(grid, self._changed)
        on_change((self.rate, self.seed), self.worker.redraw)
        self._changed()

    @property
    def settings(self) -> dict[str, Any]:
        """What the grid's controls say, as arguments of `explore_learning_rates`."""
        counts = {"num_rates": self.num_rates.value, "num_seeds": self.num_seeds.value}
        return {"rates": self.rates.value, **counts, "optimizer": self.optimizer.value}

    @property
    def call(self) -> str:
        """The code that reproduces the picture."""
        settings = {**self.settings, "steps": self.steps, **self._hyperparameters}
        return f"explore_learning_rates({self._called}{keywords(settings)})"

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
        rates = [rate for rate in spread(*rates, num_rates) for _ in range(num_seeds)]
        seeds, models = [*range(num_seeds)] * num_rates, []  # M = rates x seeds
        for seed in seeds:  # built anew at each rate: that is quicker than a deep copy
            with seeded(seed):
                models.append(self._build())
        batch = ModelBatch(models, seeds=seeds)
        factory = OptimizerFactory(getattr(torch.optim, optimizer), self._hyperparameters)
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
        usual = seconds[len(seconds) // 2] / loss.shape[1]
        cost = {"ms-a-model-and-step": f"{1e3 * usual:.3g}"}
        return {"step": len(loss), "models": loss.shape[1], "diverged": lost, **marked, **cost}


explore_learning_rates = LearningRateExplorer
