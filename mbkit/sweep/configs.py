"""Configurations: made from a grid or by sampling, divided among optimizer, loss, data and build, cut into batches."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..batch.validate import check_models
from ..common.checks import did_you_mean, whole_number
from ..common.random_streams import global_state, set_global_state


def grid(space: Mapping[str, Sequence[Any]] | None = None, /, **values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return every combination of some values as configurations for `sweep`; the last name changes fastest.

    Args:
        space: name to list of values, for names that are no Python words (`"lr@head"`).
        **values: likewise.

    Example:
        >>> grid(lr=[0.1, 0.2], momentum=[0.0, 0.9])[:2]
        [{'lr': 0.1, 'momentum': 0.0}, {'lr': 0.1, 'momentum': 0.9}]
    """
    columns = {name: list(own) for name, own in {**(space or {}), **values}.items()}
    return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())]


def sample(space: Mapping[str, Any] | None = None, /, *, n: int, seed: int = 0, **ranges: Any) -> list[dict[str, Any]]:
    """Return `n` configurations drawn at random; the same seed draws the same ones.

    Args:
        space: name to what is drawn from: a list to choose from, a tuple `(low, high)` of two floats or of two whole
            numbers (both included), or `(low, high, "log")` for equal chances of equal ratios.
        n: how many. seed: of a generator of its own.
        **ranges: as `space`.

    Raises:
        TypeError, ValueError: something else to draw from, or a range that is upside down or not positive for "log".

    Example:
        >>> [config["width"] for config in sample(lr=(1e-4, 1e-1, "log"), width=[16, 32], n=2)]
        [32, 32]
    """
    whole_number(n, "n")
    generator, every = random.Random(seed), {**(space or {}), **ranges}
    return [{name: draw(name, own, generator) for name, own in every.items()} for _ in range(n)]


def draw(name: str, own: Any, generator: random.Random) -> Any:
    """Return one value out of a list or a range."""
    if not is_range(name, own):
        return generator.choice(own)
    low, high = own[:2]
    if isinstance(low, int) and isinstance(high, int):
        if len(own) == 2:
            return generator.randint(low, high)
        return min(high, math.floor(math.exp(generator.uniform(math.log(low), math.log(high + 1)))))
    if len(own) == 3:
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return generator.uniform(low, high)


def is_range(name: str, own: Any) -> bool:
    """Say whether values are drawn from a range, a tuple, and not chosen from a list; refuse what is neither."""
    if isinstance(own, list) and own:
        return False
    numbers = isinstance(own, tuple) and len(own) in (2, 3) and all(isinstance(v, (int, float)) for v in own[:2])
    if not numbers or own[2:] not in ((), ("log",)):
        told = f"Expected a list to choose {name!r} from, or (low, high) or (low, high, 'log'), got {own!r}"
        raise TypeError(f"{told}: write e.g. (1e-4, 1e-1, 'log').")
    if not own[0] <= own[1] or (len(own) == 3 and own[0] <= 0):
        raise ValueError(f"Expected low <= high{' and low > 0' * (len(own) == 3)} for {name!r}, got {own!r}.")
    return True


@dataclass(frozen=True)
class Parts:
    """One configuration, divided among those who take it.

    Attributes:
        build, optimizer, loss, data: arguments by name. groups: pattern of parameters to the optimizer's arguments.
        max_norm, seed: as `fit` and `ModelBatch` take them, or None.
    """

    build: dict[str, Any]
    optimizer: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    loss: dict[str, Any]
    data: dict[str, Any]
    max_norm: float | None = None
    seed: int | None = None

    def kind(self) -> tuple:
        """Return what all trials of a batch must have in common, beside the architecture."""
        patterns = tuple((pattern, *own) for pattern, own in self.groups.items())
        return patterns, tuple(sorted(self.loss)), tuple(sorted(self.data)), self.max_norm is None


def divide(
    configs: Sequence[Mapping[str, Any]], build: Callable[..., nn.Module], optimizer_cls: type[torch.optim.Optimizer]
) -> list[Parts]:
    """Divide configurations by their names.

    `lr` and whatever else the optimizer takes goes to the optimizer, `lr@PATTERN` to it for the parameters that match
    the pattern only; `loss_beta` is the loss's `beta`; `data_fold` is an argument of the callable `data`; `seed` and
    `max_norm` are what they are for `ModelBatch` and `fit`; the rest goes to `build`.

    Raises:
        ValueError: a name that nobody takes.
    """
    taken = inspect.signature(build).parameters
    of_build = None if any(p.kind is p.VAR_KEYWORD for p in taken.values()) else set(taken)
    of_optimizer = set(inspect.signature(optimizer_cls).parameters) - {"params"}
    parts = []
    for trial, config in enumerate(configs):
        own = Parts({}, {}, {}, {}, {}, config.get("max_norm"), config.get("seed"))
        for name, value in config.items():
            short, at, pattern = name.partition("@")
            if at and short in of_optimizer:
                own.groups.setdefault(pattern, {})[short] = value
            elif name in of_optimizer:
                own.optimizer[name] = value
            elif name.startswith(("loss_", "data_")):
                getattr(own, name[:4])[name[5:]] = value
            elif of_build is None or name in of_build:
                own.build[name] = value
            elif name not in ("max_norm", "seed"):
                known = of_optimizer | of_build | {"seed", "max_norm"}
                told = f"Nobody takes {name!r} of trial {trial}: not the optimizer, nor build, nor does it begin with"
                raise ValueError(f"{told} loss_ or data_.{did_you_mean(name, known)}")
        parts.append(own)
    return parts


def cut(trials: Iterable[int], kinds: Sequence[int], models_per_batch: int) -> list[list[int]]:
    """Return trials in batches: those of one kind together, in the order of their numbers.

    Example:
        >>> cut([0, 1, 2, 5], [0, 1, 0, 1, 0, 0], 2)
        [[0, 2], [5], [1]]
    """
    alike: dict[int, list[int]] = {}
    for trial in sorted(trials):
        alike.setdefault(kinds[trial], []).append(trial)
    size = models_per_batch
    return [own[i : i + size] for _, own in sorted(alike.items()) for i in range(0, len(own), size)]


def build_model(build: Callable[..., nn.Module], own: Parts, seed: int) -> nn.Module:
    """Return a trial's model as it is alone after all generators were seeded."""
    seed_all(seed)
    return build(**own.build)


def seed_all(seed: int) -> None:
    """Seed the generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def find_kinds(build: Callable[..., nn.Module], parts: Sequence[Parts], seeds: Sequence[int]) -> list[int]:
    """Return a number for each trial; those of one number can be models of one batch."""
    known: dict[Any, int] = {}  # architecture by what build was told
    first: dict[Any, list[tuple[int, nn.Module]]] = {}  # the architectures met, by the shapes of their parameters
    kinds: dict[tuple, int] = {}
    found, before = [], global_state()
    for own, seed in zip(parts, seeds, strict=True):
        told = repr(sorted(own.build.items()))
        if told not in known:
            model = build_model(build, own, seed)
            alike = first.setdefault(tuple((name, p.shape) for name, p in model.named_parameters()), [])
            known[told] = next((n for n, other in alike if _stack(other, model)), -1)
            if known[told] < 0:
                check_models([model])
                known[told] = sum(map(len, first.values()))
                alike.append((known[told], model))
        found.append(kinds.setdefault((known[told], own.kind()), len(kinds)))
    set_global_state(before)
    return found


def _stack(one: nn.Module, other: nn.Module) -> bool:
    try:
        check_models([one, other])
    except ValueError:
        return False
    return True


def group_labels(groups: Any, configs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return a label for each trial; those of one label are ranked by the mean of their scores.

    Args:
        groups: None; the name, or a tuple of names, in which trials of one group differ (`"data_fold"`); or labels.

    Raises:
        ValueError: another number of labels than trials, or a name that no configuration has.
    """
    if groups is None:
        return list(range(len(configs)))
    if isinstance(groups, (str, tuple)):
        names = {groups} if isinstance(groups, str) else set(groups)
        if not names <= {name for config in configs for name in config}:
            raise ValueError(f"Expected groups as names in the configurations, got {groups!r}: pass e.g. 'data_fold'.")
        told = [repr(sorted((k, v) for k, v in config.items() if k not in names)) for config in configs]
        places = {one: place for place, one in enumerate(dict.fromkeys(told))}
        return [places[one] for one in told]
    labels = list(groups)
    if len(labels) != len(configs):
        raise ValueError(f"Expected {len(configs)} labels as groups (one per trial), got {len(labels)}.")
    return labels
