"""The map of which learning rates train, made to be redrawn many times a second; with curves.py, knows matplotlib."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import Tensor

from .curves import ALONE, WRONG, Picture, label_decades, tidy
from .trainability import Trainability

__all__ = ["RateMap"]

LOWEST = -4.0  # log10 of the last loss in units of the first: the darkest color, and the end of the loss axis


class RateMap:
    """The figure of `plots.trainability`: N x N networks, a pixel each, and beside them the loss of one of them.

    Args:
        first_rates: [N]. second_rates: [N].
        steps: how many will be made.
    """

    def __init__(self, first_rates: Tensor, second_rates: Tensor, steps: int, dpi: float = 100) -> None:
        self.rates = (first_rates, second_rates)
        self.picture = Picture(8.6, 4.0, dpi=dpi)
        self.picture.set_layout_engine("none")  # finding the margins would take longer than drawing does
        margins = {"left": 0.09, "right": 0.985, "top": 0.92, "bottom": 0.13, "wspace": 0.34}
        self.left, self.right = self.picture.subplots(1, 2, width_ratios=(5, 4), gridspec_kw=margins)
        colors = ListedColormap(colormaps["viridis"](torch.linspace(0, 0.93, 128).numpy()))
        extent = [end for rates in self.rates for end in _edges(rates)]
        # What diverged is not a number, and white: paler than any of viridis, to all eyes.
        empty = torch.full((len(second_rates), len(first_rates)), math.nan)
        look = {"cmap": colors, "vmin": LOWEST, "vmax": 0.0, "interpolation": "nearest", "origin": "lower"}
        image = self.left.imshow(empty.numpy(), extent=extent, aspect="auto", **look)
        bar = self.picture.colorbar(image, ax=self.left, pad=0.02, ticks=range(int(LOWEST), 1))
        bar.ax.set_yticklabels([f"{10.0**tick:g}" for tick in range(int(LOWEST), 1)], fontsize=8)
        bar.set_label("last loss / first loss", fontsize=8)
        self.left.set(xlabel="first rate", ylabel="second rate")
        _label(self.left, *self.rates)
        self.right.set(xlabel="step", ylabel="loss / first loss", yscale="log", xlim=(0, max(2, steps)))
        self.right.set_ylim(10**LOWEST, 10.0)
        tidy(self.right)
        label_decades(self.right.yaxis)
        (ring,) = self.left.plot([], [], "o", color=WRONG, markersize=11, fillstyle="none", markeredgewidth=2.5)
        (curve,) = self.right.plot([], [], color=ALONE, linewidth=2)
        said = [axes.text(0, 1.03, "", transform=axes.transAxes, fontsize=9) for axes in (self.left, self.right)]
        self.artists = [image, ring, curve, *said]
        for artist in self.artists:
            artist.set_animated(True)
        self._background: Any = None

    def update(self, outcome: Trainability, chosen: tuple[int, int] | None = None) -> None:
        """Show the networks as they are after the steps so far, and mark the one in row and column `chosen`."""
        image, ring, curve, left, right = self.artists
        lost = outcome.diverged
        ratio = outcome.ratio.double().clamp(min=10.0 ** (LOWEST - 1)).masked_fill(lost, math.nan)
        image.set_data(ratio.log10().numpy())
        steps = len(outcome.loss)
        left.set_text(
            f"step {steps} of {outcome.steps}: {int(lost.sum()):,} of {lost.numel():,} networks diverged (white)"
        )
        if chosen is None:
            return
        row, column = chosen
        first, second = self.rates[0][column].item(), self.rates[1][row].item()
        ring.set_data([math.log10(first)], [math.log10(second)])
        loss = (outcome.loss[:, row, column] / outcome.loss[0, row, column]).double()
        curve.set_data(range(1, steps + 1), loss.masked_fill(~loss.isfinite(), math.nan).tolist())
        right.set_text(f"rates {first:.4g} and {second:.4g}{': diverged' if lost[row, column] else ''}")

    def frame(self) -> bytes:
        """Return the present picture as a PNG."""
        canvas = self.picture.canvas
        if self._background is None:
            canvas.draw()
            self._background = canvas.copy_from_bbox(self.picture.bbox)
        canvas.restore_region(self._background)
        for artist in self.artists:
            artist.axes.draw_artist(artist)
        return self.picture.frame(draw=False)


def _edges(rates: Tensor) -> list[float]:
    """Return where the pixels begin and end, in log10: half a pixel around the outer rates."""
    low, high = rates[[0, -1]].log10().tolist()
    half = (high - low) / max(1, len(rates) - 1) / 2 or 0.5
    return [low - half, high + half]


def _label(axes: Axes, first: Tensor, second: Tensor) -> None:
    for axis, rates in ((axes.xaxis, first), (axes.yaxis, second)):
        low, high = rates[[0, -1]].log10().tolist()
        ticks = [low + (high - low) * part / 4 for part in range(5)]
        digits = max(3, 2 - math.floor(math.log10(high - low or 1.0)))  # enough to tell the ticks apart
        axis.set_ticks(ticks, [f"{10**tick:.{digits}g}" for tick in ticks], fontsize=8)
