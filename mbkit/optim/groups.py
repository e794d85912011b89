"""Parameter groups by name, with other hyperparameters in other layers, for each of M models; their lone optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..common.checks import did_you_mean
from .configs import merge_configs
from .hyperparameters import OptimizerClass

Configs = Sequence[Sequence[dict[str, Any]]]  # of M models, for each of G groups
Names = Sequence[Sequence[str]]  # of the parameters in each of G groups


def split_groups(
    optimizer_cls: OptimizerClass,
    stacked: Mapping[str, nn.Parameter],
    configs: list[dict[str, Any]],
    groups: Sequence[dict[str, Any]] | None,
) -> tuple[list[list[str]], list[list[dict[str, Any]]]]:
    """Return the names of each of G groups, and M lists of G configs.

    Args:
        optimizer_cls: the class whose hyperparameters these are.
        stacked: the parameters `[M, ...]` to train, by name.
        configs: M dicts of hyperparameters, for all parameters.
        groups: G dicts with "params" and what overrides the configs; or None, for one group of all parameters.

    Raises:
        TypeError, ValueError: as `create_optimizer`.

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
        raise TypeError(f"Expected a list of dicts as groups, got {groups!r}: write [{{'params': 'fc1', 'lr': …}}, …].")
    left, taken, columns = list(names), [], []
    for g, group in enumerate(groups):
        group = dict(group)
        chosen, said = _chosen(group.pop("params", None), stacked, f"'params' of group {g}", f" (group {g})")
        own = [name for name in left if name in chosen]
        if not own:
            told = f"Group {g} ({said}) is left without parameters, which belong to the first group that names them"
            raise ValueError(f"{told}: put the narrower group first.")
        left = [name for name in left if name not in own]
        taken.append(own)
        columns.append(merge_configs(optimizer_cls, len(configs), {}, None, group))
    if left:
        told = f"No group names {', '.join(left[:3])}{' …' if len(left) > 3 else ''}: it would not be trained"
        raise ValueError(f"{told}. Add a last group {{'params': '*'}}, or say which to train by params=[…].")
    rows = zip(*columns, strict=True)
    return taken, [[{**config, **own} for own in row] for config, row in zip(configs, rows, strict=True)]


def chosen_parameters(stacked: Mapping[str, nn.Parameter], params: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that one or several names, patterns or functions choose; all for None.

    Raises:
        TypeError: something else than these.
        ValueError: a name that no parameter has, or nothing that is chosen.

    Example:
        >>> stacked = {"0.weight": nn.Parameter(torch.ones(2, 3, 4)), "1.bias": nn.Parameter(torch.ones(2, 3))}
        >>> list(chosen_parameters(stacked, "1.*"))
        ['1.bias']
    """
    if params is None:
        return dict(stacked)
    chosen, said = _chosen(params, stacked, "params")
    if not chosen:
        raise ValueError(f"Expected parameters to train, got none by {said}: choose some, or all by '*'.")
    return {name: param for name, param in stacked.items() if name in chosen}


def _chosen(given: Any, stacked: Mapping[str, nn.Parameter], what: str, where: str = "") -> tuple[set[str], str]:
    """Return the names that names, patterns and functions choose, and these in words; a name has to be there."""
    patterns = list(given) if isinstance(given, (list, tuple)) else [given]
    if not patterns or not all(isinstance(pattern, str) or callable(pattern) for pattern in patterns):
        told = f"Expected names as {what}, got {given!r}: pass those that a lone model's parameters have"
        raise TypeError(f"{told}, such as {next(iter(stacked))!r}, or a function (name, parameter) -> bool.")
    chosen: set[str] = set()
    for pattern in patterns:
        if callable(pattern):
            rows = {name: nn.Parameter(p.detach()[0], requires_grad=p.requires_grad) for name, p in stacked.items()}
            chosen.update(name for name, row in rows.items() if pattern(name, row))
            continue
        found = [n for n in stacked if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)]
        if not found:
            raise ValueError(f"No parameter is called {pattern!r}{where}.{did_you_mean(pattern, list(stacked))}")
        chosen.update(found)
    return chosen, ", ".join(getattr(pattern, "__name__", str(pattern)) for pattern in patterns)


def parameters_of(groups: Sequence[dict[str, Any]]) -> list[nn.Parameter]:
    """Return all parameters of the groups in one list."""
    return [param for group in groups for param in group["params"]]


def lone_shapes(batch: Any, names: Names) -> list[nn.Parameter]:
    """Return parameters without memory that have a lone model's shapes."""
    stacked = batch.stacked_params
    return [nn.Parameter(torch.empty_like(stacked[n][0], device="meta")) for group in names for n in group]


def construct(
    optimizer_cls: OptimizerClass, params: Sequence[Sequence[nn.Parameter]], configs: Sequence[dict[str, Any]], m: int
) -> torch.optim.Optimizer:
    """Return a lone optimizer over G groups; where its class refuses the numbers, the error names model m."""
    groups, name_of = [], optimizer_cls.__name__
    for group, config in zip(params, configs, strict=True):  # one by one: torch checks the numbers in keywords only
        try:
            lone = optimizer_cls(list(group), **config)
        except (ValueError, TypeError, AssertionError) as error:
            raise type(error)(f"{name_of} refuses the hyperparameters of model {m}, {config}: {error}") from None
        groups.extend(lone.param_groups)  # filled up with the class's own defaults
    if len(params) > 1:
        for name in {name for config in configs for name in config} - set(lone.defaults):
            values = [config.get(name) for config in configs]
            if any(value != values[0] for value in values):
                told = f"{name_of} keeps one {name!r} for all groups of model {m}, got {' and '.join(map(str, values))}"
                raise ValueError(f"{told}: pass it once, outside of the groups.")
        lone = optimizer_cls(groups, **configs[0])
    if len(lone.param_groups) != len(params):
        told = f"Expected {name_of} to keep parameters in {len(params)} group(s), got {len(lone.param_groups)}"
        raise TypeError(f"{told}: train with one optimizer per model, over batch.models.")
    return lone
