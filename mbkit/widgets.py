"""Sliders over the same pure functions as the static figures. Only here and in *explorer.py is ipywidgets known.

An explorer is a widget: the last line of a cell shows it. Its callbacks only post wishes to a `Worker`, whose thread
trains and draws; so a slider never hangs, and of many values the newest wins. On a page without a kernel the picture
stays, as a PNG. In notebooks leave a core to the browser: `torch.set_num_threads(max(1, os.cpu_count() - 1))`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ipywidgets as ipw
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import consistency, plots
from .data import Batches, demo_points
from .explorer import GENERATOR, OPTIMIZERS, WIDE, Explorer, choice, live_curves, log_range, name_of, spread
from .fault_explorer import FaultExplorer, explore_faults
from .model_batch import ModelBatch
from .models import MLP
from .optim import OptimizerFactory
from .outcome import SWITCHES
from .trainability_explorer import TrainabilityExplorer, explore_trainability
from .training import train_steps

__all__ = [
    "ConsistencyExplorer",
    "FaultExplorer",
    "LearningRateExplorer",
    "TrainabilityExplorer",
    "explore_consistency",
    "explore_faults",
    "explore_learning_rates",
    "explore_trainability",
    "live_curves",
]


class ConsistencyExplorer(Explorer):
    """See `explore_consistency`."""

    def __init__(self, **settings: Any) -> None:
        preset, gradients = settings.pop("preset"), settings.pop("gradients")
        weights, order = settings.pop("weights"), settings.pop("order")
        demo = consistency.preset(preset, **settings)
        rates = demo.learning_rates
        self._given = (min(rates), max(rates), len(rates)), rates
        self.outcome: consistency.Outcome | None = None
        self.preset = choice("preset", list(consistency.PRESETS), preset)
        self.rates = log_range("learning rates", min(rates), max(rates))
        self.models = ipw.IntSlider(len(rates), 1, 6, description="models M", style=WIDE)
        self.seed = ipw.IntSlider(demo.seed, 0, 100, description="seed", style=WIDE)
        self.optimizer = choice("optimizer", OPTIMIZERS, demo.optimizer)
        given = {"gradients": gradients, "weights": weights, "order": order}
        self.switches = {name: choice(name, SWITCHES[name], value) for name, value in given.items()}
        controls = [
            (self.preset, self.optimizer),
            (self.rates, self.models, self.seed),
            tuple(self.switches.values()),
        ]
        super().__init__(controls, 860, 320)
        for control in (control for row in controls for control in row):
            control.observe(self._changed, "value")
        self._changed()

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, as arguments of `explore_consistency`."""
        shown = (*self.rates.value, self.models.value)
        rates = self._given[1] if shown == self._given[0] else spread(*shown)  # a list need not be evenly spaced
        chosen = {name: control.value for name, control in self.switches.items()}
        named = {"seed": self.seed.value, "optimizer": self.optimizer.value}
        return {"preset": self.preset.value, "learning_rates": rates, **named, **chosen}

    @property
    def call(self) -> str:
        """The code that reproduces the picture."""
        settings = self.settings
        switches = "".join(f", {name}={settings.pop(name)!r}" for name in SWITCHES)
        preset = settings.pop("preset")
        demo = f"preset({preset!r}, {', '.join(f'{name}={value!r}' for name, value in settings.items())})"
        return f"plots.consistency(consistency.run(consistency.{demo}{switches}))"

    def _changed(self, _: Any = None) -> None:
        self.request(**self.settings)

    def _start(self, preset: str, gradients: str, weights: str, order: str, **settings: Any) -> Iterator[None]:
        demo = consistency.preset(preset, **settings)
        with GENERATOR:
            outcomes = consistency.walk(demo, gradients, weights, order)
        for self.outcome in outcomes:
            yield

    def _picture(self) -> bytes:
        return plots.consistency(self.outcome).frame()

    def _facts(self) -> dict[str, Any]:
        if self.outcome is None:
            return {}
        faults = ", ".join(self.outcome.faults) or "none"
        steps = len(self.outcome.parameter_difference)
        ends = {
            "step": steps,
            "largest-difference": f"{self.outcome.max_difference:.1%}",
            "verdict": self.outcome.verdict,
        }
        return {**ends, "faults": faults}


def explore_consistency(
    preset: str = "published",
    gradients: str = "stale",
    weights: str = "other",
    order: str = "other",
    **settings: Any,
) -> ConsistencyExplorer:
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
    return ConsistencyExplorer(preset=preset, gradients=gradients, weights=weights, order=order, **settings)


class LearningRateExplorer(Explorer):
    """See `explore_learning_rates`."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        batches: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        rates: tuple[float, float],
        num_rates: int,
        num_seeds: int,
        optimizer: str,
        steps: int,
        called: str,
        hyperparameters: dict[str, Any],
    ) -> None:
        self._build, self._batches, self._loss_fn, self._called = build, batches, loss_fn, called
        self._hyperparameters, self.steps = hyperparameters, steps
        self.rates = log_range("learning rates", *rates)
        self.num_rates = ipw.IntSlider(num_rates, 1, 32, description="rates", style=WIDE)
        self.num_seeds = ipw.IntSlider(num_seeds, 1, 16, description="seeds", style=WIDE)
        self.optimizer = choice("optimizer", OPTIMIZERS, optimizer)
        grid = (self.rates, self.num_rates, self.num_seeds, self.optimizer)
        self.rate = ipw.SelectionSlider(options=[0], description="show rate", style=WIDE)
        self.seed = ipw.IntSlider(0, 0, num_seeds - 1, description="show seed", style=WIDE)
        self.curves: plots.LearningRates | None = None
        self.loss, self.done = torch.empty(0, 0), 0  # [steps, M], and how many of the steps are made
        self.seconds: list[float] = []  # a step of all models
        super().__init__([grid[:3], (self.optimizer, self.rate, self.seed)], 860, 320)
        for control in grid:
            control.observe(self._changed, "value")
        for control in (self.rate, self.seed):
            control.observe(lambda _: self.worker.redraw(), "value")
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
        return f"explore_learning_rates({self._called}{', '.join(f'{k}={v!r}' for k, v in settings.items())})"

    @property
    def chosen(self) -> int:
        """The highlighted model: rates in the outer loop, seeds in the inner one."""
        return self.rate.index * self.num_seeds.value + self.seed.value

    def _changed(self, _: Any = None) -> None:
        rates = spread(*self.rates.value, self.num_rates.value)
        options = [(f"{rate:.3g}", rate) for rate in rates]
        if list(self.rate.options) != options:
            self.rate.options = options
            self.rate.index = len(rates) // 2
        self.seed.max = self.num_seeds.value - 1
        self.request(learning_rates=rates, num_seeds=self.num_seeds.value, optimizer=self.optimizer.value)

    def _start(self, learning_rates: Sequence[float], num_seeds: int, optimizer: str) -> Iterator[None]:
        rates = [rate for rate in learning_rates for _ in range(num_seeds)]
        seeds, models = [*range(num_seeds)] * len(learning_rates), []  # M = rates x seeds
        with GENERATOR, torch.random.fork_rng(devices=[]):
            for seed in seeds:  # built anew at each rate: that is quicker than a deep copy
                torch.default_generator.manual_seed(seed)
                models.append(self._build())
        batch = ModelBatch(models, seeds=seeds)
        factory = OptimizerFactory(getattr(torch.optim, optimizer), self._hyperparameters)
        updates = factory.create_optimizer(batch, lr=rates)
        self.curves = plots.LearningRates(rates, self.steps)
        self.done, self.seconds, self.loss = 0, [], torch.empty(self.steps, len(rates))
        walk = train_steps(batch, updates, self._batches, self._loss_fn, self.steps)  # a walk has at least one step
        for step in itertools.islice(walk, self.steps):
            self.loss[self.done] = step.losses
            self.seconds.append(step.seconds)
            self.done += 1
            yield

    def _picture(self) -> bytes:
        self.curves.update(self.loss[: self.done], min(self.chosen, self.loss.shape[1] - 1))
        return self.curves.frame()

    def _facts(self) -> dict[str, Any]:
        seconds = sorted(self.seconds)  # a copy: the thread may begin a new run at any time
        done = min(self.done, len(seconds))
        if not done:
            return {}
        loss = self.loss[:done]
        lost = int(plots.diverged(loss, self.curves.window).sum())
        shown = f"{loss[-1, min(self.chosen, loss.shape[1] - 1)].item():.4g}"
        marked = {"rate": self.rate.label, "seed": self.seed.value, "loss": shown}
        usual = seconds[len(seconds) // 2] / loss.shape[1]
        cost = {"ms-a-model-and-step": f"{1e3 * usual:.3g}"}
        return {"step": done, "models": loss.shape[1], "diverged": lost, **marked, **cost}


def explore_learning_rates(
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
) -> LearningRateExplorer:
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
    if (build is None) != (batches is None):
        raise ValueError("Expected both build and batches, or neither for the demo's: got one of them.")
    called = "" if build is None else f"{name_of(build)}, batches, "
    if build is None:
        build, batches = _demo()
    settings = (rates, num_rates, num_seeds, optimizer, steps)
    return LearningRateExplorer(build, batches, loss_fn, *settings, called, hyperparameters)


def _demo() -> tuple[Callable[[], nn.Module], Batches]:
    with GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(42)
        return lambda: MLP((20, 16, 16, 4)), Batches(*demo_points(500, 20, 4), batch_size=50)
