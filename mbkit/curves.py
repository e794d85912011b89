"""Pictures, and loss curves of many models that can be redrawn many times a second."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

ALONE, BATCHED, WRONG, RIGHT, GRAY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#767676"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")  # drawn ten times faster than a formula
CEILING = 1.25  # times the largest first loss: there a loss axis ends, and beyond it a model counts as diverged


class Picture(Figure):
    """A matplotlib Figure with a canvas of its own; in a notebook it is a small PNG of its width in CSS pixels."""

    def __init__(self, width: float = 8.6, height: float = 3.2, dpi: float = 140, **kwargs: Any) -> None:
        super().__init__(figsize=(width, height), dpi=dpi, layout="constrained", **kwargs)
        FigureCanvasAgg(self)

    def frame(self, draw: bool = True) -> bytes:
        """Return a PNG that is quick to make; of the canvas as it is, without drawing it, where asked for."""
        if draw:
            self.canvas.draw()
        size, out = self.canvas.get_width_height(), io.BytesIO()
        Image.frombuffer("RGBA", size, self.canvas.buffer_rgba()).save(out, "png", compress_level=1)
        return out.getvalue()

    def png(self, colors: int = 128) -> bytes:
        """Return a PNG that is small: with a palette, a quarter of the size of one without."""
        return palette_png(self.frame(), colors)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.png(), {"width": round(100 * self.get_figwidth())}


def palette_png(png: bytes, colors: int = 128) -> bytes:
    """Return the same PNG with a palette of so many colors."""
    image, out = Image.open(io.BytesIO(png)), io.BytesIO()
    # Maximum coverage keeps colors that few pixels have: a small red cross stays red.
    image = image.convert("RGB").quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(out, "png", optimize=True)
    return out.getvalue()


class LearningRates:
    """The figure of `learning_rates`, made to be redrawn many times a second: only what changes is painted again."""

    def __init__(
        self, rates: Sequence[float], steps: int, accuracy: Tensor | None = None, *, title: str = "", dpi: float = 100
    ) -> None:
        self.rates, self.steps, self.accuracy = torch.tensor(list(rates), dtype=torch.float64), steps, accuracy
        self.title, self.window = f"{title}: " if title else "", max(1, steps // 25)
        self.picture = Picture(dpi=dpi)
        self.picture.set_layout_engine("none")  # finding the margins would take longer than drawing does
        margins = {"left": 0.08, "right": 0.985, "top": 0.91, "bottom": 0.15, "wspace": 0.22}
        self.left, self.right = self.picture.subplots(1, 2, width_ratios=(3, 2), gridspec_kw=margins)
        low, high = self.rates.min().log().item(), self.rates.max().log().item()
        place = (self.rates.log() - low) / (high - low or 1.0)  # [M], 0 to 1
        self.colors = colormaps["viridis"](0.9 * place.numpy())
        smooth = f", mean of {self.window} steps" if self.window > 1 else ""
        self.left.set(xlabel="step", ylabel=f"training loss{smooth}", xlim=(0, max(2, steps)))
        self.right.set(
            xlabel="learning rate", xscale="log", xlim=(self.rates.min().item() / 1.6, 1.6 * self.rates.max().item())
        )
        self.right.set_ylabel("final loss" if accuracy is None else "accuracy on the test set (%)")
        for axes in (self.left, self.right):
            tidy(axes)
        label_decades(self.right.xaxis)
        curves = self.left.add_collection(LineCollection([], colors=self.colors, linewidths=1.1), autolim=False)
        (chosen,) = self.left.plot([], [], color=WRONG, linewidth=3)
        (median,) = self.right.plot([], [], color=GRAY, linewidth=1.2, label="median of the seeds")
        dots = self.right.scatter(self.rates.tolist(), [math.nan] * len(self.rates), c=self.colors, s=22, zorder=3)
        (lost,) = self.right.plot([], [], "x", color=WRONG, markersize=7, label="diverged", clip_on=False)
        (ring,) = self.right.plot([], [], "o", color=WRONG, markersize=11, fillstyle="none", markeredgewidth=2.5)
        count = self.left.text(0, 1.03, "", transform=self.left.transAxes, fontsize=9)
        self.artists = [curves, chosen, median, dots, lost, ring, count]
        for artist in self.artists:
            artist.set_animated(True)
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "borderpad": 0.2, "columnspacing": 1}
        self.right.legend(handles=[median, lost], fontsize=8, frameon=False, **above)
        self._background: Any = None
        self._ends: tuple[float, float] | None = None  # of the loss axes

    def update(self, loss: Tensor, highlight: int | None = None) -> None:
        """Show `loss` [t, M], the first t steps, and mark the model `highlight`."""
        curves, chosen, median, dots, lost, ring, count = self.artists
        loss = loss.detach().cpu().double()
        gone, shown = diverged(loss, self.window), smooth(loss, self.window)
        shown = shown.masked_fill(~(shown <= ceiling(loss)), math.nan)  # [t, M]: left out, not drawn at the edge
        self._scale(shown.nan_to_num(nan=math.inf).min().item(), ceiling(loss))
        steps = torch.arange(1, len(shown) + 1, dtype=torch.float64)
        lines = torch.stack([steps[:, None].expand_as(shown), shown], -1).transpose(0, 1)  # [M, t, 2]
        curves.set_segments(list(lines.numpy()))
        last = shown[-1] if self.accuracy is None else 100 * self.accuracy.cpu().double()
        last = last.masked_fill(gone, math.nan)
        dots.set_offsets(torch.stack([self.rates, last], 1).numpy())
        rates = self.rates.unique()
        median.set_data(rates.tolist(), [last[self.rates == rate].nanquantile(0.5).item() for rate in rates])
        edge = self.right.get_ylim()[self.accuracy is None]  # where losses are worst, or accuracies
        lost.set_data(self.rates[gone].tolist(), [edge] * int(gone.sum()))
        place = edge if highlight is not None and gone[highlight] else last[highlight or 0]
        ring.set_data(*([[], []] if highlight is None else [[self.rates[highlight].item()], [float(place)]]))
        chosen.set_data(*([[], []] if highlight is None else lines[highlight].T.tolist()))
        count.set_text(
            f"{self.title}step {len(loss)} of {self.steps}, {int(gone.sum())} of {len(gone)} models diverged"
        )

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

    def _scale(self, low: float, top: float) -> None:
        """Set the axes' ends, and set them again, with room to spare, where the losses have sunk below."""
        if self._ends is None or low < self._ends[0]:
            bottom = 0.0 if low < 0.4 * top else low - 0.3 * (top - low)
            self._ends, self._background = (min(bottom, top / 2), top), None
            self.left.set_ylim(self._ends)
            most = 1.0 if self.accuracy is None else self.accuracy.max().item()
            self.right.set_ylim(self._ends if self.accuracy is None else (0, min(100.0, 120 * most)))


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


def tidy(axes: Axes, grid: str = "y") -> None:
    """Leave away what an axes can do without, and add a faint grid along x or y."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
