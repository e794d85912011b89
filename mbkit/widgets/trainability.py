"""The explorer of which pairs of learning rates train, with a zoom into the boundary."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as ipw
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.checks import whole_number
from ..figures.curves import DIVERGED, RateMap, place_in
from ..lessons.trainability import GROUPS, WINDOW, Range, RateGrid, Trainability, TwoLayers, spaced
from .controls import OPTIMIZERS, WIDE, check_size, choice, known, objects, slider
from .explorer import Explorer

SIZES = (16, 32, 64, 128, 256)


class TrainabilityExplorer(Explorer):
    """Show which pairs of learning rates train, one pixel a network, all in one batch; zoom into the boundary.

    The mark stands on the boundary when the map is new or zoomed, so that the next zoom finds something; two sliders,
    or a click on the map, take it elsewhere.

    Args:
        build, batches, loss_fn, optimizer, steps, **hyperparameters: as for `explore_learning_rates`; the models are
            `trainability.TwoLayers` where absent, and all networks start from the same weights.
        groups: the names of the parameters that have the first rate, and of those that have the second, as
            `create_optimizer(groups=…)` takes them.
        first_rates: the lowest and the highest first rate. second_rates: likewise the second.
        size: networks a side, at most 256; M is its square.
        seed: of the weights.
        mark: the place of the marked network, from the left and from below, 0 to 1; on the boundary where absent.

    Raises:
        ValueError, TypeError: as `explore_learning_rates`.

    Example:
        >>> explorer = explore_trainability(size=16, steps=20, mark=(0.5, 0.5)).wait()
        >>> tuple(explorer.outcome.loss.shape)
        (20, 16, 16)
        >>> explorer.zoom.value = 1  # as a hand would: half the range, around the mark
        >>> explorer.wait().settings["first_rates"], explorer.settings["second_rates"]
        ((0.1, 10.0), (0.0562341325, 1.77827941))
        >>> explorer.close()
    """

    opens = "explore_trainability"
    shows = (
        "Left: a map with one pixel for each pair of rates, dark where the loss has fallen most and white where the "
        "network diverged. Right: the loss of the marked network, step by step."
    )
    note = DIVERGED
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
        mark: tuple[float, float] | None = None,
        **hyperparameters: Any,
    ) -> None:
        given = objects(build, batches, loss_fn, F.mse_loss)
        self.steps, self._groups, self._hyperparameters = whole_number(steps, "steps"), groups, hyperparameters
        for name, rates in (("first_rates", first_rates), ("second_rates", second_rates)):
            spaced(*rates, 2, name)  # or it is refused
        self.window = self._whole = tuple(first_rates), tuple(second_rates)
        check_size(whole_number(size, "size") ** 2, steps)
        self._to_edge, self._zoomed = mark is None, 0

        def grid(size: int, seed: int, optimizer: str) -> RateGrid:
            named = {"size": size, "seed": seed, "optimizer_cls": getattr(torch.optim, optimizer), "groups": groups}
            return RateGrid(build or TwoLayers, batches, loss_fn, **named, **known(optimizer, hyperparameters))

        self._grid = functools.lru_cache(2)(grid)  # a coarse and a fine one, trained again at each zoom
        chosen = choice("optimizer", OPTIMIZERS, optimizer)
        known(optimizer, hyperparameters, all_of_them=True)
        sizes = {"options": sorted({*SIZES, size}), "value": size, "description": "networks a side", "style": WIDE}
        place = {"min": 0.0, "max": 1.0, "step": 0.01, "readout": False, "style": WIDE}  # the picture says the rates
        marked = zip(("first", "second"), mark or (0.5, 0.5), strict=True)
        marks = {name: ipw.FloatSlider(value, description=f"show {name}", **place) for name, value in marked}
        rows = [
            {"size": ipw.SelectionSlider(**sizes), "seed": slider("seed", seed, 0, 100), "optimizer": chosen},
            {"zoom": slider("zoom", 0, 0, 10), **marks},
        ]
        super().__init__(rows, ["zoom", *marks], given, height=400)

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, as arguments of `explore_trainability`."""
        return {"first_rates": self.window[0], "second_rates": self.window[1], **super().settings}

    @property
    def chosen(self) -> tuple[int, int]:
        """The row and the column of the highlighted network."""
        return self._place(self.outcome)

    def _named(self) -> dict[str, Any]:
        mark = {"mark": (round(self.first.value, 4), round(self.second.value, 4))}
        groups = {} if self._groups == GROUPS else {"groups": self._groups}
        return {"steps": self.steps, **mark, **groups, **known(self.optimizer.value, self._hyperparameters)}

    def _place(self, outcome: Trainability) -> tuple[int, int]:
        last = len(outcome.first_rates) - 1
        return round(self.second.value * last), round(self.first.value * last)

    def _changed(self, name: str) -> None:
        if name != "zoom":
            self._to_edge = self._to_edge and name not in ("first", "second")  # a mark that a hand has moved stays
            return super()._changed(name)
        # A window around the mark, half as wide for each step of the zoom; no zoom is the whole map again.
        factor, self._zoomed = 2.0 ** (self._zoomed - self.zoom.value), self.zoom.value
        sides = zip(self.window, (self.first.value, self.second.value), strict=True)
        self.window = tuple(_around(*ends, place, factor) for ends, place in sides) if self.zoom.value else self._whole
        self.first.value = self.second.value = 0.5
        self._to_edge = True
        self.request()

    def _clicked(self, across: float, down: float) -> None:
        place, size = place_in(self.map.left, across, down), len(self.outcome.first_rates)
        if place is not None:
            self.first.value, self.second.value = (min(int(each * size), size - 1) / max(1, size - 1) for each in place)

    def _start(self, first_rates: Range, second_rates: Range, size: int, **named: Any) -> Iterator[None]:
        """Train a coarse map first, which is there at once, and then the one that was asked for."""
        check_size(size * size, self.steps)
        for part in (4, 1) if size >= 64 else (1,):
            grid = self._grid(size // part, **named)
            chart = RateMap(spaced(*first_rates, grid.size), spaced(*second_rates, grid.size), self.steps)
            for outcome in grid.train(first_rates, second_rates, self.steps):
                self.map, self.outcome = chart, outcome
                yield
        if self._to_edge:
            self._to_edge = False
            row, column = _nearest_edge(self.outcome.diverged, self.chosen)
            self.first.value, self.second.value = column / max(1, size - 1), row / max(1, size - 1)

    def _picture(self) -> bytes:
        self.map.update(self.outcome, self.chosen)
        return self.map.frame()

    def _facts(self) -> dict[str, Any]:
        outcome = self.outcome  # of one moment: the thread may put another map there at any time
        row, column = self._place(outcome)
        marked = {"first-rate": outcome.first_rates[column], "second-rate": outcome.second_rates[row]}
        lost = outcome.diverged
        counts = {"step": len(outcome.loss), "networks": lost.numel(), "diverged": int(lost.sum())}
        return {**counts, **{name: f"{rate.item():.4g}" for name, rate in marked.items()}}


def _around(low: float, high: float, place: float, factor: float) -> Range:
    """Return the range `factor` times as wide, in log10, around what is at `place`, 0 to 1."""
    low, high = math.log10(low), math.log10(high)
    middle, half = low + place * (high - low), factor * (high - low) / 2
    return tuple(float(f"{10**end:.9g}") for end in (middle - half, middle + half))


def _nearest_edge(diverged: Tensor, near: tuple[int, int]) -> tuple[int, int]:
    """Return the pixel nearest to one of those whose neighbor to the right or above is of the other kind, or that."""
    edge = torch.zeros_like(diverged)
    edge[:-1] |= diverged[1:] != diverged[:-1]
    edge[:, :-1] |= diverged[:, 1:] != diverged[:, :-1]
    places = edge.nonzero()
    if not len(places):
        return near
    return tuple(places[(places - torch.tensor(near)).square().sum(1).argmin()].tolist())


explore_trainability = TrainabilityExplorer
