"""The explorer of which pairs of learning rates train, with a zoom into the boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as ipw
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.checks import whole_number
from ..figures.curves import RateMap
from ..lessons.trainability import GROUPS, WINDOW, Range, RateGrid, Trainability, TwoLayers, spaced
from .explorer import WIDE, check_range, slider
from .grid import GridExplorer, check_size

__all__ = ["TrainabilityExplorer", "explore_trainability"]

SIZES = (16, 32, 64, 128, 256)


class TrainabilityExplorer(GridExplorer):
    """Show which pairs of learning rates train, one pixel a network, all in one batch; zoom into the boundary.

    Args:
        build: makes one model, drawing its weights from torch's default generator, which is seeded before each call;
            `trainability.TwoLayers` where absent. All networks start from the same weights.
        batches: an iterable of (inputs, targets), as for `fit`.
        loss_fn: one model's outputs and targets to one number.
        groups: the names of the parameters that have the first rate, and of those that have the second, as
            `create_optimizer(groups=…)` takes them.
        first_rates: the lowest and the highest first rate. second_rates: likewise the second.
        size: networks a side, at most 256; M is its square.
        seed: of the weights.
        optimizer: the name of a class of `torch.optim`.
        steps: how many updates are made.
        **hyperparameters: of the optimizer, such as momentum=0.9.

    Raises:
        ValueError: only one of build and batches; rates that are not 0 < lowest <= highest; a number out of its range.

    Example:
        >>> explorer = explore_trainability(size=16, steps=20).wait()
        >>> tuple(explorer.outcome.loss.shape)
        (20, 16, 16)
        >>> explorer.zoom.value = 1  # as a hand would: half the range, around the mark
        >>> explorer.wait().call.split(", size")[0]
        'explore_trainability(first_rates=(0.1, 10.0), second_rates=(0.0562341325, 1.77827941)'
        >>> explorer.close()
    """

    outcome: Trainability
    map: RateMap

    def __init__(
        self,
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
    ) -> None:
        named = {"groups": groups, **hyperparameters}
        self._describe("explore_trainability", build, batches, optimizer, steps, named)
        self._trained = {"build": build or TwoLayers, "batches": batches, "loss_fn": loss_fn}
        self._grids: dict[tuple[Any, ...], RateGrid] = {}
        self.window = self._whole = check_range("first_rates", first_rates), check_range("second_rates", second_rates)
        check_size(whole_number(size, "size") ** 2, steps)
        sizes = {"options": sorted({*SIZES, size}), "value": size, "description": "networks a side"}
        self.size = ipw.SelectionSlider(**sizes, style=WIDE)
        self.seed = slider("seed", seed, 0, 100)
        self.zoom = slider("zoom", 0, 0, 10)
        place = {"value": 0.5, "min": 0.0, "max": 1.0, "step": 0.01, "readout": False}  # the picture says the rates
        marks = [ipw.FloatSlider(**place, description=f"show {name}", style=WIDE) for name in ("first", "second")]
        self.first, self.second = marks
        rows = [(self.size, self.seed, self.optimizer), (self.zoom, *marks)]
        super().__init__(rows, (self.zoom, *marks), height=400)
        self.zoom.observe(self._zoomed, "value")

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, as arguments of `explore_trainability`."""
        named = {"size": self.size.value, "seed": self.seed.value, "optimizer": self.optimizer.value}
        return {"first_rates": self.window[0], "second_rates": self.window[1], **named}

    @property
    def chosen(self) -> tuple[int, int]:
        """The row and the column of the highlighted network."""
        return self._place(self.outcome)

    def _place(self, outcome: Trainability) -> tuple[int, int]:
        last = len(outcome.first_rates) - 1
        return round(self.second.value * last), round(self.first.value * last)

    def _zoomed(self, change: dict[str, Any]) -> None:
        """Take a window around the mark, half as wide for each step of the zoom; no zoom is the whole map again."""
        factor = 2.0 ** (change["old"] - change["new"])
        sides = zip(self.window, (self.first.value, self.second.value), strict=True)
        self.window = tuple(_around(*ends, place, factor) for ends, place in sides) if self.zoom.value else self._whole
        self.first.value = self.second.value = 0.5
        self._changed()

    def _grid(self, size: int, seed: int, optimizer: str) -> RateGrid:
        key = size, seed, optimizer
        if key not in self._grids:
            self._grids = {other: grid for other, grid in self._grids.items() if other[1:] == key[1:]}
            named = {"size": size, "seed": seed, "optimizer_cls": getattr(torch.optim, optimizer)}
            self._grids[key] = RateGrid(**named, **self._trained, **self._named)
        return self._grids[key]

    def _start(self, first_rates: Range, second_rates: Range, size: int, **named: Any) -> Iterator[None]:
        """Train a coarse map first, which is there at once, and then the one that was asked for."""
        check_size(size * size, self.steps)
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
        outcome = self.outcome  # of one moment: the thread may put another map there at any time
        row, column = self._place(outcome)
        marked = {"first-rate": outcome.first_rates[column], "second-rate": outcome.second_rates[row]}
        counts = {"step": len(outcome.loss), "networks": outcome.diverged.numel()}
        lost = {"diverged": int(outcome.diverged.sum())}
        return {**counts, **lost, **{name: f"{rate.item():.4g}" for name, rate in marked.items()}}


def _around(low: float, high: float, place: float, factor: float) -> Range:
    """Return the range `factor` times as wide, in log10, around what is at `place`, 0 to 1."""
    low, high = math.log10(low), math.log10(high)
    middle, half = low + place * (high - low), factor * (high - low) / 2
    return tuple(float(f"{10**end:.9g}") for end in (middle - half, middle + half))


explore_trainability = TrainabilityExplorer
