"""Parameter groups by name: other hyperparameters in other layers, for each of M models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..common.checks import did_you_mean
from .configs import merge_configs

__all__ = ["split_groups"]


def split_groups(
    optimizer_cls: type[torch.optim.Optimizer],
    stacked: Mapping[str, nn.Parameter],
    configs: list[dict[str, Any]],
    groups: Sequence[dict[str, Any]] | None,
) -> tuple[list[list[str]], list[list[dict[str, Any]]]]:
    """Return the names of each of G groups, and M lists of G configs.

    Args:
        optimizer_cls: the class whose hyperparameters these are.
        stacked: all parameters `[M, ...]` by name.
        configs: M dicts of hyperparameters, for all parameters.
        groups: G dicts with "params" and what overrides the configs; or None, for one group of all parameters.

    Raises:
        TypeError: not a list of dicts with names or functions as "params"; a value that is not a number where one is
            needed.
        ValueError: a name that no parameter has, a parameter that no group names, a group that is left without
            parameters, and what `merge_configs` refuses.

    Example:
        >>> stacked = {"0.weight": nn.Parameter(torch.ones(2, 3, 4)), "0.bias": nn.Parameter(torch.ones(2, 3))}
        >>> groups = [{"params": lambda name, p: p.ndim < 2, "lr": 2.0}, {"params": "0"}]
        >>> split_groups(torch.optim.SGD, stacked, [{"lr": 1.0}], groups)
        ([['0.bias'], ['0.weight']], [[{'lr': 2.0}, {'lr': 1.0}]])
    """
    names = list(stacked)
    if groups is None:
        return [names], [[config] for config in configs]
    if not isinstance(groups, (list, tuple)) or not groups or not all(isinstance(group, dict) for group in groups):
        raise TypeError(
            f"Expected a list of dicts as groups, got {groups!r}: write [{{'params': 'name', 'lr': …}}, …]."
        )
    left, taken, columns = list(names), [], []
    for g, group in enumerate(groups):
        group = dict(group)
        given = group.pop("params", None)
        patterns = list(given) if isinstance(given, (list, tuple)) else [given]
        if not patterns or not all(isinstance(pattern, str) or callable(pattern) for pattern in patterns):
            raise TypeError(
                f"Expected names as 'params' of group {g}, got {given!r}: the batch's parameters are stacked, so "
                f"name them as a lone model does, such as {names[0]!r}, or pass a function (name, parameter) -> bool."
            )
        chosen = [[name for name in names if _chooses(pattern, name, stacked[name])] for pattern in patterns]
        for pattern, found in zip(patterns, chosen, strict=True):
            if isinstance(pattern, str) and not found:
                raise ValueError(f"No parameter is called {pattern!r} (group {g}).{did_you_mean(pattern, names)}")
        own = [name for name in left if any(name in found for found in chosen)]
        if not own:
            said = ", ".join(getattr(pattern, "__name__", str(pattern)) for pattern in patterns)
            raise ValueError(
                f"Group {g} ({said}) is left without parameters: a parameter belongs to the first group that names it, "
                "so put the narrower group first."
            )
        left = [name for name in left if name not in own]
        taken.append(own)
        columns.append(merge_configs(optimizer_cls, len(configs), {}, None, group))
    if left:
        raise ValueError(
            f"No group names {', '.join(left[:3])}{' …' if len(left) > 3 else ''}: it would not be trained. "
            "Add a last group {'params': '*'}, or freeze it with requires_grad_(False)."
        )
    rows = zip(*columns, strict=True)
    return taken, [[{**config, **own} for own in row] for config, row in zip(configs, rows, strict=True)]


def _chooses(pattern: str | Callable[[str, nn.Parameter], Any], name: str, stacked: nn.Parameter) -> bool:
    if callable(pattern):
        return bool(pattern(name, nn.Parameter(stacked.detach()[0], requires_grad=stacked.requires_grad)))
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
