"""Figures of the benchmark suite: speed-ups as bars, and what one of M models costs as M grows."""

from __future__ import annotations

import math
from typing import Any

from .curves import ALONE, BATCHED, GRAY, RIGHT, WRONG, Picture, label_decades, tidy


def speedups(result: Any) -> Picture:
    """Draw how many times as fast as a loop each way to train is: a panel for each network, a bar for each way.

    Of each network the case is drawn that most ways were measured in, and of these the one with the most models.

    Args:
        result: from `suite.run_suite`.
    """
    cases = {row["network"]: row for row in result.rows}  # in their order
    for row in sorted(result.rows, key=lambda row: (len(row["seconds"]), row["num_models"])):
        cases[row["network"]] = row
    ratios = {network: {side: result.ratio(row, side) for side in row["seconds"]} for network, row in cases.items()}
    if not all(ratio for measured in ratios.values() for ratio in measured.values()):
        raise ValueError("Expected a loop among the sides, to compare with, got none: measure it, too.")
    sides = [side for side in result.sides() if any(side in measured for measured in ratios.values())]
    picture = Picture(2.2 + 1.75 * len(cases), 0.9 + 0.27 * len(sides))
    panels = picture.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, (network, measured) in zip(panels, ratios.items(), strict=True):
        most = max(measured.values())
        for place, side in enumerate(sides):
            ratio = measured.get(side)
            axes.barh(place, ratio or 0, 0.7, color=BATCHED if side.startswith("mbkit") else ALONE)
            text = "–" if ratio is None else f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"
            look = {"va": "center", "fontsize": 8, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.6}}
            axes.text((ratio or 0) + 0.03 * most, place, text, **look)
        axes.axvline(1, color=GRAY, linewidth=1, zorder=0)  # as fast as a loop
        axes.set(xlim=(0, 1.25 * most), xticks=[], ylim=(len(sides) - 0.4, -0.6))
        axes.set_yticks(range(len(sides)), sides, fontsize=9)
        axes.tick_params(left=False)
        row = cases[network]
        axes.set_title(f"{row['num_models']:,} × {network}\nbatch {row['batch_size']}", fontsize=9)
        axes.spines[:].set_visible(False)
    picture.supxlabel("times as fast as a loop over the models (the line)", fontsize=9)
    return picture


def growth(result: Any) -> Picture:
    """Draw what one of M models costs, as M grows: building it, a step of it in mbkit and in a loop, and its memory.

    Args:
        result: from `suite.run_suite`; a panel for each network that was measured with more than one M.

    Raises:
        ValueError: there is none.
    """
    rows: dict[tuple[str, int], list[Any]] = {}
    for row in sorted(result.rows, key=lambda row: row["num_models"]):
        rows.setdefault((row["network"], row["batch_size"]), []).append(row)
    rows = {what: own for what, own in rows.items() if len(own) > 1}
    if not rows:
        raise ValueError("Expected a network with several numbers of models, got none: measure more cases.")
    picture = Picture(max(6.5, 3.2 * len(rows)), 3.4)
    panels = picture.subplots(1, len(rows), squeeze=False)[0]
    for axes, ((network, batch), own) in zip(panels, rows.items(), strict=True):
        sizes, costs = [row["num_models"] for row in own], [row["costs"].get("mbkit") for row in own]
        for side, color, look in (("", ALONE, "o-"), ("mbkit", BATCHED, "s-"), ("mbkit compiled", WRONG, "d-")):
            times = [result.timing(row, side or result.loop_of(row)) for row in own]
            medians = [1e3 * time.median if time else math.nan for time in times]
            if any(times):
                axes.plot(sizes, medians, look, color=color, markersize=4, label=f"a step, {side or 'a loop'}")
        axes.set(xscale="log", yscale="log", xlabel="models M")
        axes.set_title(f"{network}, batch {batch}", fontsize=9)
        axes.minorticks_off()
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        label_decades(axes.yaxis)
        tidy(axes)
        if all(costs):
            building = [1e3 * (cost["models"] + cost["build"]) / m for m, cost in zip(sizes, costs, strict=True)]
            axes.plot(sizes, building, "^--", color=GRAY, markersize=4, label="building it, once")
        if all(cost and cost["memory"] for cost in costs):
            memory = axes.twinx()
            each = [cost["memory"] / 1e3 / m for m, cost in zip(sizes, costs, strict=True)]
            axes.plot([], [], "x:", color=RIGHT, markersize=4, label="memory (right)")
            memory.plot(sizes, each, "x:", color=RIGHT, markersize=4)
            memory.set(yscale="log", ylabel="peak memory, kB a model")
            memory.minorticks_off()
            label_decades(memory.yaxis)
            memory.spines[["top"]].set_visible(False)
    picture.axes[0].set_ylabel("ms a model")
    picture.axes[0].legend(fontsize=8, frameon=False, loc="best")
    return picture
