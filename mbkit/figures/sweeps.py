"""Sweeps as parallel coordinates."""

from __future__ import annotations

import math
from typing import Any

from matplotlib import colormaps

from .curves import GRAY, Picture

_MOST_LINES = 2000  # past which a picture takes seconds and shows no more


def parallel_coordinates(result: Any) -> Picture:
    """Draw a line for each trial: across an axis for each setting, then one for its score at each rung.

    Trials that were dropped are gray and end at their last rung. The others run from dark to light, the best light.

    Args:
        result: from `sweep`.
    """
    trials = result.ranked[:_MOST_LINES]
    names = [name for name in result.names if len({repr(trial.config.get(name)) for trial in trials}) > 1]
    rungs = max((trial.rungs for trial in trials), key=len)
    columns = [_places([trial.config.get(name) for trial in trials]) for name in names]
    scores = [[trial.scores[r] if r < len(trial.rungs) else math.nan for trial in trials] for r in range(len(rungs))]
    finite = sorted(score for own in scores for score in own if math.isfinite(score)) or [0.0, 1.0]
    low, high = finite[len(finite) // 20], finite[-1]  # one hopeless trial does not flatten the others
    span = high - low or 1.0
    ticks = [(share, f"{low + share * span:.3g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for own in scores:
        heights = [(score - low) / span if math.isfinite(score) else math.nan for score in own]
        columns.append(([max(height, -0.05) for height in heights], ticks))  # NaN stays NaN
    picture = Picture(max(6.0, 1.25 * len(columns)), 3.6)
    axes = picture.subplots()
    last = [len(trial.rungs) == len(rungs) for trial in trials]
    finalists = sum(last)
    for place, i in enumerate(sorted(range(len(trials)), key=lambda i: (last[i], -i))):
        rank = place - (len(trials) - finalists)
        color = colormaps["viridis"]((rank + 1) / finalists) if last[i] else GRAY
        line = {"color": color, "linewidth": 1.2 if last[i] else 0.5, "alpha": 0.9 if last[i] else 0.25}
        axes.plot(range(len(columns)), [heights[i] for heights, _ in columns], **line)
    for x, (_, own) in enumerate(columns):
        axes.axvline(x, color="#333333", linewidth=0.8)
        for height, word in own:
            behind = {"color": "white", "alpha": 0.6, "pad": 0.3}
            axes.text(x + 0.03, height, word, fontsize=7, va="center", bbox=behind)
    axes.set_xticks(range(len(columns)), [*names, *(f"score\nafter {epochs}" for epochs in rungs)], fontsize=8)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.1, len(columns) - 0.6)
    return picture


def _places(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return a setting's values as heights from 0 to 1, one step for each value, and what to write at which height.

    So values that were drawn on a log scale are as far apart as those that were drawn on another.
    """
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    keys = values if numbers else list(map(repr, values))
    known = sorted(set(keys)) if numbers else list(dict.fromkeys(keys))
    heights, last = {key: i / max(1, len(known) - 1) for i, key in enumerate(known)}, len(known) - 1
    shown = [known[last * part // 4] for part in range(5)] if numbers and last > 7 else known
    return [heights[key] for key in keys], [(heights[key], _word(key)) for key in shown]


def _word(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
