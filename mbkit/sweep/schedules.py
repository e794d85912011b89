"""The state of one lr scheduler for models that several others had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["join_schedules"]


def join_schedules(parts: Sequence[tuple[Any, Sequence[int], int]]) -> Any:
    """Return the state of one schedule for some models of several.

    A list with an entry for each parameter group, such as `base_lrs`, or for each model is taken apart.

    Args:
        parts: a schedule's state_dict(), the models wanted of it, and how many it has.
    """
    if not isinstance(parts[0][0], dict):
        return parts[0][0]
    joined = {}
    for name, value in parts[0][0].items():
        if isinstance(value, list) and (name == "schedulers" or name.endswith(("lrs", "_lr", "lr_lambdas"))):
            sizes = [len(state[name]) // count for state, _, count in parts]
            joined[name] = [
                one
                for (state, rows, _), size in zip(parts, sizes, strict=True)
                for m in rows
                for one in state[name][m * size : (m + 1) * size]
            ]
        elif name == "_schedulers":  # of SequentialLR and ChainedScheduler
            inner = range(len(value))
            joined[name] = [
                join_schedules([(state[name][i], rows, count) for state, rows, count in parts]) for i in inner
            ]
        else:
            joined[name] = value
    return joined
