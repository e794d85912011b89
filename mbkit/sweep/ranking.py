"""Who goes on: successive halving of whole rungs, and patience. It depends on scores only, never on a clock."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any


def ordered(scores: Sequence[float]) -> list[int]:
    """Return places from the highest score to the lowest; NaN is lowest, and of equals the first comes first.

    Example:
        >>> ordered([0.5, math.nan, 0.9, 0.5])
        [2, 0, 3, 1]
    """
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i], i))


def group_scores(trials: Iterable[Any], labels: Sequence[Hashable]) -> dict[Hashable, list[float]]:
    """Return each label's mean scores, rung by rung; trials of one label have come equally far.

    Args:
        trials: some of a sweep's. labels: of all its trials.
    """
    groups: dict[Hashable, list[list[float]]] = {}
    for trial in trials:
        groups.setdefault(labels[trial.number], []).append(trial.scores)
    return {label: [sum(each) / len(each) for each in zip(*scores, strict=True)] for label, scores in groups.items()}


def promoted(
    trials: Sequence[Any],
    going: Sequence[int],
    labels: Sequence[Hashable],
    reduction_factor: int | None,
    patience: int | None,
) -> list[int]:
    """Return the trials that go on to the next rung.

    Args:
        trials: of the sweep. going: the numbers of those that came to this rung.
        labels: of all trials; those of one label stand and fall by the mean of their scores.
        reduction_factor, patience: as `sweep` has them.
    """
    means = group_scores((trials[t] for t in going), labels)
    names = list(means)
    if reduction_factor is not None:
        order = ordered([means[name][-1] for name in names])
        names = [names[i] for i in order[: max(1, len(names) // reduction_factor)]]
    if patience is not None:
        names = [name for name in names if len(means[name]) - 1 - ordered(means[name])[0] < patience]
    kept = set(names)
    return sorted(t for t in going if labels[t] in kept)
