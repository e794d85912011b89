"""The explorer of which pairs of learning rates train, with a zoom into the boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as ipw
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .curves import RateMap
from .explorer import GENERATOR, OPTIMIZERS, WIDE, Explorer, choice, name_of
from .trainability import GROUPS, WINDOW, Range, RateGrid, Trainability, TwoLayers, spaced

__all__ = ["TrainabilityExplorer", "explore_trainability"]

SIZES = (16, 32, 64, 128, 256)


class TrainabilityExplorer(Explorer):
    """See `explore_trainability`."""

    def __init__(self, first_rates: Range, second_rates: Range, steps: int, called: str, **settings: Any) -> None:
        size, seed, optimizer = (settings.pop(name) for name in ("size", "seed", "optimizer"))
        self._settings, self._called, self.steps = settings, called, steps
        self._grids: dict[tuple[Any, ...], RateGrid] = {}
        spaced(*first_rates, 2), spaced(*second_rates, 2)  # refused at once
        self.window = self._whole = (tuple(map(float, first_rates)), tuple(map(float, second_rates)))
        self.outcome: Trainability | None = None
        self.map: RateMap | None = None
        self.size = ipw.SelectionSlider(
            options=sorted({*SIZES, size}), value=size, description="networks a side", style=WIDE
        )
        self.seed = ipw.IntSlider(seed, 0, 100, description="seed", style=WIDE)
        self.optimizer = choice("optimizer", OPTIMIZERS, optimizer)
        self.zoom = ipw.IntSlider(0, 0, 10, description="zoom", style=WIDE)
        self.first = ipw.FloatSlider(0.5, min=0.0, max=1.0, step=0.01, description="show first", style=WIDE)
        self.second = ipw.FloatSlider(0.5, min=0.0, max=1.0, step=0.01, description="show second", style=WIDE)
        for slider in (self.first, self.second):
            slider.readout = False  # the picture says the rates
        super().__init__([(self.size, self.seed, self.optimizer), (self.zoom, self.first, self.second)], 860, 400)
        for control in (self.size, self.seed, self.optimizer):
            control.observe(self._changed, "value")
        for slider in (self.first, self.second):
            slider.observe(lambda _: self.worker.redraw(), "value")
        self.zoom.observe(self._zoomed, "value")
        self._changed()

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, as arguments of `explore_trainability`."""
        named = {"size": self.size.value, "seed": self.seed.value, "optimizer": self.optimizer.value}
        return {"first_rates": self.window[0], "second_rates": self.window[1], **named}

    @property
    def call(self) -> str:
        """The code that reproduces the picture."""
        others = {name: value for name, value in self._settings.items() if name not in ("build", "batches", "loss_fn")}
        settings = {**self.settings, "steps": self.steps, **others}
        return f"explore_trainability({self._called}{', '.join(f'{k}={v!r}' for k, v in settings.items())})"

    @property
    def chosen(self) -> tuple[int, int]:
        """The row and the column of the highlighted network."""
        last = (self.size.value if self.outcome is None else len(self.outcome.first_rates)) - 1
        return round(self.second.value * last), round(self.first.value * last)

    def _zoomed(self, change: dict[str, Any]) -> None:
        """Take a window around the mark, half as wide for each step of the zoom; no zoom is the whole map again."""
        factor = 2.0 ** (change["old"] - change["new"])
        sides = zip(self.window, (self.first.value, self.second.value), strict=True)
        self.window = tuple(_around(*ends, place, factor) for ends, place in sides) if self.zoom.value else self._whole
        self.first.value = self.second.value = 0.5
        self._changed()

    def _changed(self, _: Any = None) -> None:
        self.request(**self.settings)

    def _grid(self, size: int, seed: int, optimizer: str) -> RateGrid:
        if (size, seed, optimizer) not in self._grids:
            kept = {key: grid for key, grid in self._grids.items() if key[1:] == (seed, optimizer)}
            with GENERATOR:
                cls = getattr(torch.optim, optimizer)
                grid = RateGrid(size=size, seed=seed, optimizer_cls=cls, **self._settings)
            self._grids = {**kept, (size, seed, optimizer): grid}
        return self._grids[size, seed, optimizer]

    def _start(self, first_rates: Range, second_rates: Range, size: int, **named: Any) -> Iterator[None]:
        """Train a coarse map first, which is there at once, and then the one that was asked for."""
        for part in (4, 1) if size >= 64 else (1,):
            grid = self._grid(size // part, **named)
            chart = RateMap(spaced(*first_rates, grid.size), spaced(*second_rates, grid.size), self.steps)
            for outcome in grid.train(first_rates, second_rates, self.steps):
                self.map, self.outcome = chart, outcome
                yield

    def _picture(self) -> bytes:
        self.map.update(self.outcome, self.chosen)
        return self.map.frame()

    def _facts(self) -> dict[str, Any]:
        outcome = self.outcome
        if outcome is None:
            return {}
        row, column = self.chosen
        marked = {"first-rate": outcome.first_rates[column], "second-rate": outcome.second_rates[row]}
        counts = {"step": len(outcome.loss), "networks": outcome.diverged.numel()}
        lost = {"diverged": int(outcome.diverged.sum())}
        return {**counts, **lost, **{name: f"{rate.item():.4g}" for name, rate in marked.items()}}


def _around(low: float, high: float, place: float, factor: float) -> Range:
    """Return the range `factor` times as wide, in log10, around what is at `place`, 0 to 1."""
    low, high = math.log10(low), math.log10(high)
    middle, half = low + place * (high - low), factor * (high - low) / 2
    return tuple(float(f"{10**end:.9g}") for end in (middle - half, middle + half))


def explore_trainability(
    build: Callable[[], nn.Module] | None = None,
    batches: Any = None,
    *,
    loss_fn: Callable[[Any, Any], Tensor] = F.mse_loss,
    groups: tuple[str, str] = GROUPS,
    first_rates: Range = WINDOW[0],
    second_rates: Range = WINDOW[1],
    size: int = 64,
    seed: int = 0,
    optimizer: str = "SGD",
    steps: int = 60,
    **hyperparameters: Any,
) -> TrainabilityExplorer:
    """Show which pairs of learning rates train, one pixel a network, all in one batch; zoom into the boundary.

    Args:
        build: makes one model, drawing its weights from torch's default generator, which is seeded before each call;
            `trainability.TwoLayers` where absent. All networks start from the same weights.
        batches: an iterable of (inputs, targets), as for `fit`.
        loss_fn: one model's outputs and targets to one number.
        groups: the names of the parameters that have the first rate, and of those that have the second, as
            `create_optimizer(groups=…)` takes them.
        first_rates: the lowest and the highest first rate. second_rates: likewise the second.
        size: networks a side; M is its square.
        seed: of the weights.
        optimizer: the name of a class of `torch.optim`.
        steps: how many updates are made.
        **hyperparameters: of the optimizer, such as momentum=0.9.

    Raises:
        ValueError: only one of build and batches; rates that are not 0 < lowest <= highest.

    Example:
        >>> explorer = explore_trainability(size=16, steps=20).wait()
        >>> tuple(explorer.outcome.loss.shape)
        (20, 16, 16)
        >>> explorer.zoom.value = 1  # as a hand would: half the range, around the mark
        >>> explorer.wait().call.split(", size")[0]
        'explore_trainability(first_rates=(0.1, 10.0), second_rates=(0.0562341325, 1.77827941)'
        >>> explorer.close()
    """
    if (build is None) != (batches is None):
        raise ValueError("Expected both build and batches, or neither for the demo's: got one of them.")
    called = "" if build is None else f"{name_of(build)}, batches, "
    named = {"size": size, "seed": seed, "optimizer": optimizer, "loss_fn": loss_fn, "groups": groups}
    built = {"build": TwoLayers if build is None else build, "batches": batches}
    return TrainabilityExplorer(first_rates, second_rates, steps, called, **named, **built, **hyperparameters)
