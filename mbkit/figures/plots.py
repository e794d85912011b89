"""Figures: plain functions of what was measured. Nothing here trains, and a figure shows itself in a notebook.

Blue is alone, orange in the batch, red wrong or diverged, green right, black what is marked; learning rates and other
rows of curves run from dark to light.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from torch import Tensor

from .curves import ALONE, BATCHED, GRAY, RAISED, RIGHT, WRONG, LearningRates, Picture, RateMap, label_decades, tidy

# What a dtype's rounding may grow to in a few hundred steps, and where its axis begins: as powers of ten.
ROUNDING = {torch.float32: (-5, -10), torch.float64: (-13, -18)}


def accuracy(outcome: Any, axes: Axes | None = None) -> Picture:
    """Draw each model's accuracy alone and in the batch, as bars.

    Args:
        outcome: from `consistency.run`.
        axes: where to draw; a picture of its own where absent.

    Example:
        >>> from mbkit.lessons import consistency
        >>> len(accuracy(consistency.run("published")).axes)
        1
    """
    axes = axes or Picture(6.5).subplots()
    demo, places = outcome.demo, torch.arange(outcome.demo.num_models)
    for offset, values, color, label in (
        (-0.2, outcome.accuracy_alone, ALONE, "alone"),
        (0.2, outcome.accuracy_batched, BATCHED, "in the batch"),
    ):
        bars = axes.bar((places + offset).tolist(), (100 * values).tolist(), 0.38, color=color, label=label)
        if demo.num_models <= 4:
            axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(places.tolist(), [f"{rate:g}" for rate in demo.learning_rates])
    axes.set(xlabel="learning rate", ylabel="accuracy (%)", ylim=(0, 119), yticks=range(0, 101, 20))
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    tidy(axes, title=f"{outcome.verdict}: up to {100 * outcome.max_difference:.1f} points apart")
    return axes.figure


def differences(named: Mapping[str, Tensor], title: str = "", axes: Axes | None = None) -> Picture:
    """Draw how differences grow, step by step, on a logarithmic axis that is always the same and ends below in zero.

    A gray band shows what rounding explains: up to 1e-5 in float32, up to 1e-13 in float64.

    Args:
        named: label to [steps], the largest absolute difference after each step; its dtype is the models'.
        title: over the axes.
        axes: where to draw; a picture of its own where absent.
    """
    axes = axes or Picture(8.0, 3.4).subplots()
    bands = [ROUNDING[dtype] for dtype in ROUNDING if any(gap.dtype == dtype for gap in named.values())]
    low, high = min(bottom for _, bottom in bands), 1
    colors = colormaps["viridis"](torch.linspace(0, 0.85, len(named)).numpy())
    for n, (label, gap) in enumerate(named.items()):
        gap = gap.double().cpu()
        gap = gap.masked_fill(~gap.isfinite(), math.nan).clamp(min=10.0**low)
        style = {"linestyle": "--", "linewidth": 1.3, "zorder": 3} if n % 2 else {"linewidth": 2.6}  # both are seen
        marks = {"marker": "o", "markersize": 3.5, "linewidth": 1.4} if len(gap) <= 60 else style
        axes.plot(range(1, len(gap) + 1), gap.tolist(), color=colors[n], label=label, **marks)
    for top, _ in bands:
        axes.axhspan(10.0 ** (low - 1), 10.0**top, color=GRAY, alpha=0.13, linewidth=0)
        axes.text(0.995, 10.0**top, "rounding", transform=axes.get_yaxis_transform(), ha="right", va="top", fontsize=8)
    ticks = range(low, high + 1, 2 if low > -12 else 3)
    axes.set(yscale="log", xlabel="step", ylabel="largest parameter difference")
    axes.set_ylim(10.0 ** (low - 0.5), 10.0 ** (high + 0.5))
    axes.minorticks_off()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yticks([10.0**tick for tick in ticks], ["0", *("10" + str(tick).translate(RAISED) for tick in ticks[1:])])
    axes.legend(fontsize=8, frameon=False, loc="best", ncols=1 if len(named) <= 4 else 2)
    tidy(axes, title=title)
    return axes.figure


def consistency(outcome: Any) -> Picture:
    """Draw an outcome in two panels: the accuracies, and the parameters' difference after each step."""
    picture = Picture(dpi=100)
    left, right = picture.panels(left=0.08, top=0.91, bottom=0.15, wspace=0.32)
    accuracy(outcome, left)
    gaps = zip(outcome.demo.learning_rates, outcome.parameter_difference.unbind(1), strict=True)
    by_rate = {f"learning rate {rate:g}": gap for rate, gap in gaps}
    differences(by_rate, "Parameters: how far from training alone", axes=right)
    return picture


def combinations(dissection: Any) -> Picture:
    """Draw the eight combinations of the three causes: how far accuracies, and parameters, are from those alone."""
    picture = Picture(8.6, 3.4)
    causes, accuracies, parameters = picture.subplots(1, 3, sharey=True, width_ratios=(2, 3, 3))
    places = list(range(len(dissection)))
    wrong = [[cause in outcome.faults for cause in dissection.causes] for outcome in dissection]
    for column in range(len(dissection.causes)):
        colors = [WRONG if row[column] else "white" for row in wrong]
        causes.scatter([column] * len(wrong), places, s=70, c=colors, edgecolors=WRONG, linewidths=1.2)
    names = [cause.replace("-", "\n") for cause in dissection.causes]
    causes.set_xticks(range(len(names)), names, fontsize=8)
    causes.set(yticks=[], xlim=(-0.6, 2.6), ylim=(len(wrong) - 0.4, -0.6))
    causes.set_title("what is wrong", fontsize=10, y=1.01)
    causes.tick_params(length=0)
    causes.spines[:].set_visible(False)
    ends = [outcome.parameter_difference[-1].max().item() for outcome in dissection]
    for panel, values, form, label in (
        (accuracies, [100 * outcome.max_difference for outcome in dissection], "%.1f", "accuracy, percentage points"),
        (parameters, ends, "%.2f", "parameters, after the last step"),
    ):
        bars = panel.barh(places, values, 0.62, color=[WRONG if any(row) else RIGHT for row in wrong])
        panel.bar_label(bars, [form % value for value in values], fontsize=8, padding=3)
        panel.set(xlabel="largest difference from training alone", xlim=(0, 1.18 * max(values) or 1))
        panel.tick_params(left=False)
        tidy(panel, "x", label)
    return picture


def learning_rates(loss: Tensor, rates: Sequence[float], title: str = "", accuracy: Tensor | None = None) -> Picture:
    """Draw the loss of M models step by step, and what became of each, against its learning rate.

    Args:
        loss: [steps, M]; not a number or infinite where a model diverged.
        rates: M learning rates; models of one rate differ in their seeds.
        title: over the figure.
        accuracy: [M] from 0 to 1, drawn at the right in place of the final loss.

    Example:
        >>> picture = learning_rates(torch.rand(10, 4), [0.1, 0.1, 1.0, 1.0])
        >>> [axes.get_xlabel() for axes in picture.axes]
        ['step', 'learning rate']
    """
    curves = LearningRates(rates, len(loss), accuracy, title=title, dpi=140)
    curves.update(loss)
    return curves.still()


def trainability(outcome: Any, chosen: tuple[int, int] | None = None) -> Picture:
    """Draw which pairs of learning rates train, one pixel a network, and the loss of one of them.

    Args:
        outcome: from `RateGrid.train`.
        chosen: the row and the column of the network whose loss is drawn, the middle one where absent.

    Example:
        >>> from mbkit.lessons.trainability import WINDOW, RateGrid
        >>> *_, outcome = RateGrid(size=4).train(*WINDOW, steps=5)
        >>> [axes.get_ylabel() for axes in trainability(outcome).axes]
        ['second rate', 'loss / first loss', 'last loss / first loss']
    """
    rates = RateMap(outcome.first_rates, outcome.second_rates, outcome.steps, dpi=140)
    middle = len(outcome.second_rates) // 2, len(outcome.first_rates) // 2
    rates.update(outcome, chosen or middle)
    return rates.still()


def benchmark(result: Any) -> Picture:
    """Draw a benchmark: the time a model and step takes alone and in the batch, and each model's test accuracy."""
    picture = Picture()
    left, right = picture.subplots(1, 2)
    sides = [
        ("alone", result.alone, result.alone_accuracy, ALONE, "o"),
        ("in the batch", result.batched, result.batched_accuracy, BATCHED, "x"),
    ]
    for name, timing, accuracies, color, mark in sides:
        spread = [[1e3 * (timing.median - timing.low)], [1e3 * (timing.high - timing.median)]]
        left.barh([name], [1e3 * timing.median], 0.55, color=color, xerr=spread, capsize=3)
        left.text(1e3 * timing.high, name, f"  {1e3 * timing.median:.2f} ms", va="center", fontsize=9)
        look = {"color": color, "markersize": 7, "label": name, "fillstyle": "none"}
        right.plot(result.learning_rates, 100 * accuracies, mark, **look)
    left.set(xlabel="time a model and step (ms), median and quartiles", xlim=(0, 1300 * max(s[1].high for s in sides)))
    left.invert_yaxis()
    tidy(left, "x", f"{result.num_models} x {result.setup['model']}, {result.speedup:.2f} times as fast in the batch")
    right.axhline(10, color=GRAY, linewidth=1, linestyle=":", label="guessing")
    top = 100 * min(1, 1.2 * result.batched_accuracy.max().item())
    right.set(xscale="log", xlabel="learning rate", ylabel="accuracy on the test set (%)", ylim=(0, top))
    right.legend(fontsize=8, frameon=False, loc="best")
    tidy(right, title=f"{result.setup['dataset']}, after {result.setup['steps']:,} steps")
    return picture


def scaling(measured: Mapping[str, Mapping[int, Any]]) -> Picture:
    """Draw the time that a model and step takes alone and in the batch, a panel for each quantity that grows.

    Args:
        measured: what grows, to its values, each with a `BenchmarkResult`: {"models M": {1: result, 16: result}}.

    Example:
        >>> from mbkit.benchmark import run_benchmark
        >>> results = {m: run_benchmark("digits", m, max_steps=4, warmup=2) for m in (1, 2)}
        >>> [axes.get_xlabel() for axes in scaling({"models M": results}).axes]
        ['models M']
    """
    picture = Picture(max(6.5, 3.4 * len(measured)), 3.2)
    panels = picture.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, (what, results) in zip(panels, measured.items(), strict=True):
        for side, color, mark in (("alone", ALONE, "o--"), ("batched", BATCHED, "s-")):
            times = [getattr(result, side) for result in results.values()]
            lows, medians, highs = ([1e3 * getattr(t, end) for t in times] for end in ("low", "median", "high"))
            label = "alone" if side == "alone" else "in the batch"
            axes.plot(list(results), medians, mark, color=color, markersize=5, label=label)
            axes.fill_between(list(results), lows, highs, color=color, alpha=0.25, linewidth=0)  # the quartiles
        axes.set(xscale="log", yscale="log", xlabel=what)
        axes.minorticks_off()
        label_decades(axes.yaxis)
        ticks: list[int] = []
        for value in sorted(results):  # labels closer than this would run into each other
            ticks += [value] if not ticks or value >= 2.5 * ticks[-1] else []
        axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
        tidy(axes)
    panels[0].set_ylabel("ms a model and step")
    panels[0].legend(fontsize=8, frameon=False, loc="best")
    return picture


def heat_map(report: Any) -> Picture:
    """Draw how far each parameter of each model is from the same model alone, step by step: one panel per model.

    Args:
        report: from `compare`; what its noise floors explain is white or light, what they don't is dark.
    """
    steps, num_models, num_parameters = report.relative.shape
    columns = min(num_models, 4)
    rows = math.ceil(num_models / columns)
    picture = Picture(8.6, rows * min(6.0, 1.1 + 0.24 * num_parameters) + 0.3, dpi=100)
    panels = picture.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low = -8 if report.tolerance > 1e-6 else -16  # where rounding begins, in float32 and in float64
    values = report.relative.nan_to_num(nan=0.0).clamp(1e-17, 1e3).log10()
    look = {"aspect": "auto", "cmap": "OrRd", "vmin": low, "vmax": 1, "interpolation": "nearest"}
    every = max(1, math.ceil(steps / 8))
    for m, axes in enumerate(panels.flat):
        axes.set_visible(m < num_models)
        if m >= num_models:
            continue
        image = axes.imshow(values[:, m].T.numpy(), **look)
        lost = (~report.within[:, m]).any(1).nonzero()
        since = f"differs from step {lost[0].item() + 1}" if len(lost) else "rounding"
        axes.set_title(f"model {m}:\n{since}", fontsize=9, color=WRONG if len(lost) else RIGHT)
        axes.set_yticks(range(num_parameters), report.parameters, fontsize=7)
        axes.set_xticks(range(0, steps, every), [str(step + 1) for step in range(0, steps, every)], fontsize=8)
        axes.spines[:].set_visible(False)
    picture.supxlabel("step", fontsize=9)
    ticks = range(low, 2, 3 if low == -8 else 4)
    bar = picture.colorbar(image, ax=panels, ticks=ticks, pad=0.01, extend="both")
    bar.ax.set_yticklabels(["10" + str(tick).translate(RAISED) for tick in ticks], fontsize=8)
    bar.set_label("difference / way come", fontsize=8)
    return picture
