"""The figure of what a model costs as something grows: how many there are, the batch, the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .curves import ALONE, BATCHED, Picture, label_decades, tidy

__all__ = ["scaling"]


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
        axes.set_xticks(list(results), [f"{value:,}" for value in results])
        tidy(axes)
    panels[0].set_ylabel("ms a model and step")
    panels[0].legend(fontsize=8, frameon=False, loc="best")
    return picture
