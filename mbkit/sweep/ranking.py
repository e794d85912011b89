"""Who goes on: successive halving of whole rungs, and patience. It depends on scores only, never on a clock."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

__all__ = ["ordered", "promoted"]


def ordered(scores: Sequence[float]) -> list[int]:
    """Return places from the highest score to the lowest; NaN is lowest, and of equals the first comes first.

    Example:
        >>> ordered([0.5, math.nan, 0.9, 0.5])
        [2, 0, 3, 1]
    """
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i], i))


def promoted(
    trials: Sequence[Any],
    going: Sequence[int],
    labels: Sequence[Hashable],
    rung: int,
    reduction_factor: int | None,
    patience: int | None,
) -> list[int]:
    """Return the trials that go on to the next rung.

    Args:
        trials: of the sweep. going: the numbers of those that came to this rung.
        labels: of all trials; those of one label stand and fall by the mean of their scores.
        rung, reduction_factor, patience: as `sweep` has them.
    """
    groups: dict[Hashable, list[int]] = {}
    for t in going:
        groups.setdefault(labels[t], []).append(t)

    def mean(label: Hashable, at: int) -> float:
        return sum(trials[t].scores[at] for t in groups[label]) / len(groups[label])

    names = list(groups)
    if reduction_factor is not None:
        order = ordered([mean(name, rung) for name in names])
        names = [names[i] for i in order[: max(1, len(names) // reduction_factor)]]
    if patience is not None:
        courses = {name: ordered([mean(name, at) for at in range(rung + 1)])[0] for name in names}
        names = [name for name in names if rung - courses[name] < patience]
    return sorted(t for name in names for t in groups[name])
