"""Figures. With curves.py the only room that knows matplotlib, and never pyplot: any thread may call what is here.

Each public function is pure: results in, a `Picture` out, which shows itself in a notebook and saves itself with
`picture.savefig(path)`. Colors are Okabe and Ito's, which the color-blind tell apart; rates run from dark to light.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from .curves import ALONE, BATCHED, GRAY, RAISED, RIGHT, WRONG, LearningRates, Picture, RateMap, label_decades, tidy

__all__ = [
    "LearningRates", "Picture", "accuracy", "benchmark", "combinations", "consistency", "differences", "heat_map",
    "learning_rates", "scaling", "story_figure", "trainability",
]  # fmt: skip

LINES = (BATCHED, ALONE, RIGHT, "#CC79A7", "#56B4E9", "#000000")


def accuracy(outcome: Any) -> Picture:
    """Draw each model's accuracy alone and in the batch, as bars.

    Args:
        outcome: from `consistency.run`.

    Example:
        >>> from mbkit.lessons import consistency
        >>> len(accuracy(consistency.run("published")).axes)
        1
    """
    picture = Picture(6.5)
    _accuracy(picture.subplots(), outcome)
    return picture


def combinations(dissection: Any) -> Picture:
    """Draw the eight combinations of the three causes: how far accuracies, and parameters, are from those alone."""
    picture = Picture(8.6, 3.4)
    _combinations(picture.subplots(1, 3, sharey=True, width_ratios=(2, 3, 3)), dissection)
    return picture


def differences(named: Mapping[str, Tensor], title: str = "", quantity: str = "parameter") -> Picture:
    """Draw how differences grow, step by step, on a logarithmic scale that has a place for exactly zero.

    Args:
        named: label to [steps], the largest absolute difference after each step.
        title: over the axes.
        quantity: of what the differences are, for the axis label.
    """
    picture = Picture(8.0, 3.4)
    _differences(picture.subplots(), named, title, quantity)
    return picture


def consistency(outcome: Any) -> Picture:
    """Draw an outcome in two panels: the accuracies, and the parameters' difference after each step."""
    picture = Picture(dpi=100)
    left, right = picture.panels(left=0.08, top=0.91, bottom=0.15, wspace=0.32)
    _accuracy(left, outcome)
    update = max(outcome.demo.learning_rates)  # beside its size rounding is seen for what it is
    _differences(right, _by_model(outcome), "Parameters: how far from training alone", top=update)
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
        outcome: from `trainability.trainability`.
        chosen: the row and the column of the network whose loss is drawn, the middle one where absent.

    Example:
        >>> from mbkit.lessons.trainability import trainability as train
        >>> [axes.get_ylabel() for axes in trainability(train(size=4, steps=5)).axes]
        ['second rate', 'loss / first loss', 'last loss / first loss']
    """
    rates = RateMap(outcome.first_rates, outcome.second_rates, outcome.steps, dpi=140)
    middle = len(outcome.second_rates) // 2, len(outcome.first_rates) // 2
    rates.update(outcome, middle if chosen is None else chosen)
    return rates.still()


def benchmark(result: Any) -> Picture:
    """Draw a benchmark: the time a model and step takes alone and in the batch, and each model's test accuracy."""
    picture = Picture(8.6, 3.2)
    left, right = picture.subplots(1, 2)
    _timing(left, result)
    _test_accuracy(right, result)
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
            times = {value: getattr(result, side) for value, result in results.items() if getattr(result, side)}
            lows, medians, highs = (
                [1e3 * getattr(t, end) for t in times.values()] for end in ("low", "median", "high")
            )
            label = "alone" if side == "alone" else "in the batch"
            axes.plot(list(times), medians, mark, color=color, markersize=5, label=label)
            axes.fill_between(list(times), lows, highs, color=color, alpha=0.25, linewidth=0)  # the quartiles
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
    picture = Picture(8.6, rows * min(6.0, 0.9 + 0.24 * num_parameters) + 0.3, dpi=100)
    panels = picture.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low = -8 if report.tolerance > 1e-6 else -16  # where rounding begins, in float32 and in float64
    values = report.relative.nan_to_num(nan=0.0).clamp(1e-17, 1e3).log10()
    look = {"aspect": "auto", "cmap": "OrRd", "vmin": low, "vmax": 1, "interpolation": "nearest"}
    rounding = report.within
    for m, axes in enumerate(panels.flat):
        if m >= num_models:
            axes.set_visible(False)
            continue
        image = axes.imshow(values[:, m].T.numpy(), **look)
        lost = (~rounding[:, m]).any(1).nonzero()
        since = f"differs from step {lost[0].item() + 1}" if len(lost) else "rounding"
        axes.set_title(f"model {m}: {since}", fontsize=9, color=WRONG if len(lost) else RIGHT)
        axes.set_yticks(range(num_parameters), report.parameters, fontsize=7)
        every = max(1, math.ceil(steps / 8))
        axes.set_xticks(range(0, steps, every), [str(step + 1) for step in range(0, steps, every)], fontsize=8)
        axes.spines[:].set_visible(False)
    picture.supxlabel("step", fontsize=9)
    ticks = range(low, 2, 3 if low == -8 else 4)
    bar = picture.colorbar(image, ax=panels, ticks=ticks, pad=0.01, extend="both")
    bar.ax.set_yticklabels(["10" + str(tick).translate(RAISED) for tick in ticks], fontsize=8)
    bar.set_label("difference / way come", fontsize=8)
    return picture


def story_figure(published: Any, dissection: Any, measured: Any = None) -> Picture:
    """Draw the whole story: the published table, how parameters drift, the eight combinations; and a benchmark."""
    picture = Picture(10, 6.4 if measured is None else 9.4)
    rows = picture.subfigures(2 if measured is None else 3, 1, squeeze=False)[:, 0]
    top = rows[0].subplots(1, 2)
    _accuracy(top[0], published)
    top[0].set_title(f"The published table, computed anew: {top[0].get_title()}", fontsize=10, y=1.01)
    stale = next(outcome for outcome in dissection if outcome.faults == ["stale-gradients"])
    _differences(top[1], _by_model(stale), "Stale gradients alone: same start, then ever further away")
    _combinations(rows[1].subplots(1, 3, sharey=True, width_ratios=(2, 3, 3)), dissection)
    if measured is not None:
        left, right = rows[2].subplots(1, 2)
        _timing(left, measured)
        _test_accuracy(right, measured)
    return picture


def _accuracy(axes: Axes, outcome: Any) -> None:
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


def _by_model(outcome: Any) -> dict[str, Tensor]:
    gaps = outcome.parameter_difference.unbind(1)
    return {f"learning rate {rate:g}": gap for rate, gap in zip(outcome.demo.learning_rates, gaps, strict=True)}


def _differences(axes: Axes, named: Mapping[str, Tensor], title: str, what: str = "parameter", top: float = 0) -> None:
    values = {label: gap.double().cpu() for label, gap in named.items()}
    positive = torch.cat([gap[gap.isfinite() & (gap > 0)] for gap in values.values()])
    bounds = (positive.min().item(), max(positive.max().item(), top)) if len(positive) else (0.1, 1.0)
    low, high = math.floor(math.log10(bounds[0])), math.ceil(math.log10(bounds[1]))
    every = max(1, math.ceil((high - low) / 6))
    zero = 10.0 ** (low - every)  # where exactly zero is drawn, a tick below the smallest number
    for n, (label, gap) in enumerate(values.items()):
        gap = gap.masked_fill(~gap.isfinite(), math.nan).masked_fill(gap == 0, zero)
        style = {"linestyle": "--", "linewidth": 1.3, "zorder": 3} if n % 2 else {"linewidth": 2.6}  # both are seen
        marks = {"marker": "o", "markersize": 3.5, "linewidth": 1.4} if len(gap) <= 60 else style
        axes.plot(range(1, len(gap) + 1), gap.tolist(), color=LINES[n % len(LINES)], label=label, **marks)
    ticks = range(low, high + 1, every)
    axes.set(yscale="log", xlabel="step", ylabel=f"largest {what} difference")
    axes.set_ylim(zero / 10 ** (every / 3), 10.0 ** (high + every / 3))
    axes.yaxis.set_major_locator(FixedLocator([zero, *(10.0**tick for tick in ticks)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticklabels(["exactly 0", *("10" + str(tick).translate(RAISED) for tick in ticks)])
    axes.legend(fontsize=8, frameon=False, loc="best", ncols=1 if len(values) <= 4 else 2)
    tidy(axes, title=title)


def _combinations(axes: Sequence[Axes], dissection: Any) -> None:
    causes, accuracies, parameters = axes
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
        panel.bar_label(bars, [form % value if value else "exactly 0" for value in values], fontsize=8, padding=3)
        panel.set(xlabel="largest difference from training alone", xlim=(0, 1.18 * max(values) or 1))
        panel.tick_params(left=False)
        tidy(panel, "x", label)


def _timing(axes: Axes, result: Any) -> None:
    sides = [("alone", result.alone, ALONE), ("in the batch", result.batched, BATCHED)]
    sides = [side for side in sides if side[1] is not None]
    for name, timing, color in sides:
        spread = [[1e3 * (timing.median - timing.low)], [1e3 * (timing.high - timing.median)]]
        axes.barh([name], [1e3 * timing.median], 0.55, color=color, xerr=spread, capsize=3)
        axes.text(1e3 * timing.high, name, f"  {1e3 * timing.median:.2f} ms", va="center", fontsize=9)
    axes.set(xlabel="time a model and step (ms), median and quartiles", xlim=(0, 1300 * max(s[1].high for s in sides)))
    axes.invert_yaxis()
    faster = f", {result.speedup:.2f} times as fast in the batch" if result.speedup else ""
    tidy(axes, "x", f"{result.num_models} x {result.setup['model']}{faster}")


def _test_accuracy(axes: Axes, result: Any) -> None:
    for values, color, mark, name in (
        (result.alone_accuracy, ALONE, "o", "alone"),
        (result.batched_accuracy, BATCHED, "x", "in the batch"),
    ):
        if values is not None:
            look = {"color": color, "markersize": 7, "label": name, "fillstyle": "none"}
            axes.plot(result.learning_rates, 100 * values, mark, **look)
    axes.axhline(10, color=GRAY, linewidth=1, linestyle=":", label="guessing")
    top = 100 * min(1, 1.2 * result.batched_accuracy.max().item())
    axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy on the test set (%)", ylim=(0, top))
    axes.legend(fontsize=8, frameon=False, loc="best")
    tidy(axes, title=f"{result.setup['dataset']}, after {result.setup['steps']:,} steps")
