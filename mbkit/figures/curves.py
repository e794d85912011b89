"""Pictures, and the two that can be redrawn many times a second: loss curves, and a map of learning rates."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

ALONE, BATCHED, WRONG, RIGHT, GRAY, MARK = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#767676", "#000000"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")  # drawn ten times faster than a formula
CEILING = 1.25  # times the highest first loss: there a loss axis ends, and beyond it a model counts as diverged
DIVERGED = f"diverged: the last loss is not a number, or above {CEILING:g} times the highest first loss."
LOWEST = -4  # log10 of the last loss in units of the first: a map's darkest color, and the end of its loss axis


class Picture(Figure):
    """A matplotlib Figure with a canvas of its own; in a notebook it is a small PNG of its width in CSS pixels."""

    def __init__(self, width: float = 8.6, height: float = 3.2, dpi: float = 140, **kwargs: Any) -> None:
        super().__init__(figsize=(width, height), dpi=dpi, layout="constrained", **kwargs)
        FigureCanvasAgg(self)

    def panels(self, ratios: tuple[int, int] = (1, 1), **margins: float) -> tuple[Axes, Axes]:
        """Return two panels with given margins: finding them would take longer than drawing does."""
        self.set_layout_engine("none")
        return tuple(self.subplots(1, 2, width_ratios=ratios, gridspec_kw={"right": 0.985, **margins}))

    def frame(self, draw: bool = True) -> bytes:
        """Return a PNG that is quick to make; of the canvas as it is, without drawing it, where asked for."""
        if draw:
            self.canvas.draw()
        size, out = self.canvas.get_width_height(), io.BytesIO()
        Image.frombuffer("RGBA", size, self.canvas.buffer_rgba()).save(out, "png", compress_level=1)
        return out.getvalue()

    def png(self) -> bytes:
        """Return a PNG that is small: with a palette, a quarter of the size of one without."""
        return palette_png(self.frame())

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        panels = [f"{axes.get_title()} {axes.get_ylabel()} against {axes.get_xlabel()}".strip() for axes in self.axes]
        return self.png(), {"width": round(100 * self.get_figwidth()), "alt": "; ".join(panels)}


def palette_png(png: bytes) -> bytes:
    """Return the same PNG with a palette of 128 colors."""
    image, out = Image.open(io.BytesIO(png)), io.BytesIO()
    # Maximum coverage keeps colors that few pixels have: a small red cross stays red.
    image = image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(out, "png", optimize=True)
    return out.getvalue()


class Live:
    """A figure that is redrawn many times a second: only its `artists` are painted again, over a kept background."""

    picture: Picture
    _background: Any = None

    def _animate(self, *artists: Artist) -> None:
        self.artists = artists
        for artist in artists:
            artist.set_animated(True)

    def frame(self) -> bytes:
        """Return the present picture as a PNG, in about 10 ms."""
        canvas = self.picture.canvas
        if self._background is None:
            canvas.draw()
            self._background = canvas.copy_from_bbox(self.picture.bbox)
        canvas.restore_region(self._background)
        for artist in self.artists:
            artist.axes.draw_artist(artist)
        return self.picture.frame(draw=False)

    def still(self) -> Picture:
        """Return the figure as any other, which is drawn as a whole."""
        for artist in self.artists:
            artist.set_animated(False)
        return self.picture


class LearningRates(Live):
    """The figure of `plots.learning_rates`."""

    def __init__(
        self, rates: Sequence[float], steps: int, accuracy: Tensor | None = None, *, title: str = "", dpi: float = 100
    ) -> None:
        self.rates, self.steps, self.accuracy = torch.tensor(list(rates), dtype=torch.float64), steps, accuracy
        self.title, self.window = f"{title}: " if title else "", max(1, steps // 25)
        self.picture = Picture(dpi=dpi)
        self.left, self.right = self.picture.panels((3, 2), left=0.08, top=0.91, bottom=0.15, wspace=0.22)
        low, high = self.rates.min().log().item(), self.rates.max().log().item()
        place = (self.rates.log() - low) / (high - low or 1.0)  # [M], 0 to 1
        self.colors = colormaps["viridis"](0.9 * place.numpy())
        smooth = f", mean of {self.window} steps" if self.window > 1 else ""
        self.left.set(xlabel="step", ylabel=f"training loss{smooth}", xlim=(0, max(2, steps)))
        ends = self.rates.min().item() / 1.6, 1.6 * self.rates.max().item()
        last = "final loss" if accuracy is None else "accuracy on the test set (%)"
        self.right.set(xlabel="learning rate", ylabel=last, xscale="log", xlim=ends)
        for axes in (self.left, self.right):
            tidy(axes)
        label_decades(self.right.xaxis)
        curves = self.left.add_collection(LineCollection([], colors=self.colors, linewidths=1.1), autolim=False)
        (chosen,) = self.left.plot([], [], color=MARK, linewidth=2.5)
        (median,) = self.right.plot([], [], color=GRAY, linewidth=1.2, label="median of the seeds")
        dots = self.right.scatter(self.rates.tolist(), [math.nan] * len(self.rates), c=self.colors, s=22, zorder=3)
        (lost,) = self.right.plot([], [], "x", color=WRONG, markersize=7, label="diverged", clip_on=False, zorder=4)
        self._animate(curves, chosen, median, dots, lost, _ring(self.right), _caption(self.left))
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "borderpad": 0.2, "columnspacing": 1}
        self.right.legend(handles=[median, lost], fontsize=8, frameon=False, **above)

    def update(self, loss: Tensor, highlight: int | None = None) -> None:
        """Show `loss` [t, M], the first t steps, and mark the model `highlight`."""
        curves, chosen, median, dots, lost, ring, count = self.artists
        loss = loss.detach().cpu().double()
        gone, shown = diverged(loss, self.window), smooth(loss, self.window)  # [t, M]; what diverges leaves at the top
        if self._background is None:  # the first time: what the losses' axes end with depends on the first losses only
            self.left.set_ylim(0, ceiling(loss))
            most = ceiling(loss) if self.accuracy is None else min(100.0, 120 * self.accuracy.max().item())
            self.right.set_ylim(0, most)
        steps = torch.arange(1, len(shown) + 1, dtype=torch.float64)
        lines = torch.stack([steps[:, None].expand_as(shown), shown], -1).transpose(0, 1)  # [M, t, 2]
        curves.set_segments(list(lines.numpy()))
        if self.accuracy is None:
            place = shown[-1].masked_fill(gone, self.right.get_ylim()[1])  # what diverged is marked at the upper edge
        else:
            place = 100 * self.accuracy.cpu().double()  # a network that diverged has one too, such as a guesser's
        last = place.masked_fill(gone, math.nan)
        dots.set_offsets(torch.stack([self.rates, last], 1).numpy())
        rates = self.rates.unique()
        median.set_data(rates.tolist(), [last[self.rates == rate].nanquantile(0.5).item() for rate in rates])
        lost.set_data(self.rates[gone].tolist(), place[gone].tolist())
        at = slice(0, 0) if highlight is None else slice(highlight, highlight + 1)
        ring.set_data(self.rates[at].tolist(), place[at].tolist())
        chosen.set_data(*lines[at].reshape(-1, 2).T.tolist())
        done = f"{self.title}step {len(loss)} of {self.steps}"
        count.set_text(f"{done}, {int(gone.sum())} of {len(gone)} models diverged")


class RateMap(Live):
    """The figure of `plots.trainability`: N x N networks, a pixel each, and beside them the loss of one of them.

    Args:
        first_rates, second_rates: [N]. steps: how many will be made.
    """

    def __init__(self, first_rates: Tensor, second_rates: Tensor, steps: int, dpi: float = 100) -> None:
        self.rates = (first_rates, second_rates)
        self.picture = Picture(height=4.0, dpi=dpi)
        self.left, self.right = self.picture.panels((5, 4), left=0.09, top=0.92, bottom=0.13, wspace=0.34)
        colors = ListedColormap(colormaps["viridis"](torch.linspace(0, 0.93, 128).numpy()))
        # What diverged is not a number, and white: paler than any of viridis, to all eyes.
        empty = torch.full((len(second_rates), len(first_rates)), math.nan)
        look = {"cmap": colors, "vmin": LOWEST, "vmax": 0.0, "interpolation": "nearest", "origin": "lower"}
        extent = [*_pixels(self.left.xaxis, first_rates), *_pixels(self.left.yaxis, second_rates)]
        image = self.left.imshow(empty.numpy(), extent=extent, aspect="auto", **look)
        bar = self.picture.colorbar(image, ax=self.left, pad=0.02, ticks=range(LOWEST, 1))
        bar.ax.set_yticklabels([f"{10.0**tick:g}" for tick in range(LOWEST, 1)], fontsize=8)
        bar.set_label("last loss / first loss", fontsize=8)
        self.left.set(xlabel="first rate", ylabel="second rate")
        self.right.set(xlabel="step", ylabel="loss / first loss", yscale="log", xlim=(0, max(2, steps)))
        self.right.set_ylim(10.0**LOWEST, 10.0)
        tidy(self.right)
        label_decades(self.right.yaxis)
        (curve,) = self.right.plot([], [], color=MARK, linewidth=2)
        self._animate(image, _ring(self.left), curve, _caption(self.left), _caption(self.right))

    def update(self, outcome: Any, chosen: tuple[int, int]) -> None:
        """Show the networks as they are after the steps so far, and mark the one in row and column `chosen`."""
        image, ring, curve, left, right = self.artists
        lost = outcome.diverged
        ratio = outcome.ratio.double().clamp(min=10.0 ** (LOWEST - 1)).masked_fill(lost, math.nan)
        image.set_data(ratio.log10().numpy())
        steps, gone = len(outcome.loss), int(lost.sum())
        left.set_text(f"step {steps} of {outcome.steps}: {gone:,} of {lost.numel():,} networks diverged (white)")
        row, column = chosen
        first, second = self.rates[0][column].item(), self.rates[1][row].item()
        ring.set_data([math.log10(first)], [math.log10(second)])
        loss = (outcome.loss[:, row, column] / outcome.loss[0, row, column]).double()
        curve.set_data(range(1, steps + 1), loss.masked_fill(~loss.isfinite(), math.nan).tolist())
        right.set_text(f"rates {first:.4g} and {second:.4g}{': diverged' if lost[row, column] else ''}")


def place_in(axes: Axes, across: float, down: float) -> tuple[float, float] | None:
    """Return where in a panel, 0 to 1 from its left and from below, a part of the picture is; None outside of it."""
    box = axes.get_position()
    along, up = (across - box.x0) / box.width, (1 - down - box.y0) / box.height
    return (along, up) if 0 <= along <= 1 and 0 <= up <= 1 else None


def _ring(axes: Axes) -> Artist:
    """What marks the chosen model: black in white, to be seen on any color."""
    look = {"markersize": 11, "fillstyle": "none", "markeredgewidth": 2, "zorder": 5}
    return axes.plot([], [], "o", color=MARK, path_effects=[withStroke(linewidth=5, foreground="white")], **look)[0]


def _caption(axes: Axes) -> Artist:
    return axes.text(0, 1.03, "", transform=axes.transAxes, fontsize=9)


def _pixels(axis: Axis, rates: Tensor) -> tuple[float, float]:
    """Label an axis in log10 with rates; return where its pixels begin and end: half a pixel around the outer rates."""
    low, high = rates[[0, -1]].log10().tolist()
    ticks = [low + (high - low) * part / 4 for part in range(5)]
    digits = max(3, 2 - math.floor(math.log10(high - low or 1.0)))  # enough to tell the ticks apart
    axis.set_ticks(ticks, [f"{10**tick:.{digits}g}" for tick in ticks], fontsize=8)
    half = (high - low) / max(1, len(rates) - 1) / 2 or 0.5
    return low - half, high + half


def ceiling(loss: Tensor) -> float:
    """Return the loss beyond which a model counts as diverged, from losses [steps, M] that begin with step 1."""
    first = loss[0][loss[0].isfinite()]
    return CEILING * first.max().item() if len(first) else CEILING


def diverged(loss: Tensor, window: int = 1) -> Tensor:
    """Return [M] bools: whose last loss, a mean of `window` steps, is not finite or a quarter above where all began.

    Args:
        loss: [steps, M], from the first step on.

    Example:
        >>> diverged(torch.tensor([[2.0, 2.0, 2.0], [1.0, 9.0, float("nan")]]))
        tensor([False,  True,  True])
    """
    return ~(smooth(loss, window)[-1] <= ceiling(loss))


def smooth(loss: Tensor, window: int) -> Tensor:
    """Return the mean of the last `window` steps, or of all so far, [steps, M]; not a number from where it is lost."""
    total = loss.double().masked_fill(~loss.isfinite(), math.nan).clamp(max=1e6).cumsum(0)  # 1e6 leaves digits for 1e-9
    before = torch.cat([total.new_zeros(window, loss.shape[1]), total])[: len(loss)]
    return (total - before) / torch.arange(1, len(loss) + 1).clamp(max=window)[:, None]


def label_decades(axis: Axis) -> None:
    """Write a log axis's ticks as plain numbers, which are drawn ten times faster than formulas."""

    def minor(value: float, _: int) -> str:
        low, high = sorted(axis.get_view_interval())
        return f"{value:g}" if high < 10 * low else ""  # they are bare where powers of ten can be seen

    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(minor)


def tidy(axes: Axes, grid: str = "y", title: str | None = None) -> None:
    """Leave away what an axes can do without; add a faint grid along x or y, and a title."""
    if title is not None:
        axes.set_title(title, fontsize=10, y=1.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
