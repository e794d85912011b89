"""Hyperparameters as users give them: checked, and merged into M dicts of plain values."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..common.checks import did_you_mean, per_model, whole_number
from .hyperparameters import SWITCHES, OptimizerClass, plain


def create_sgd_configs(
    learning_rates: Sequence[float], momentum: float = 0.9, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """Return configs for SGD, one per learning rate, for `OptimizerFactory(torch.optim.SGD).create_optimizer`.

    Args:
        learning_rates: M numbers.
        momentum, weight_decay: one for all, or a list of M.

    Raises:
        TypeError, ValueError: one number instead of M, none, or numbers that `create_optimizer` refuses.

    Example:
        >>> create_sgd_configs([0.1, 0.01], momentum=0.5)[1]
        {'lr': 0.01, 'momentum': 0.5, 'weight_decay': 0.0001}
    """
    return _one_config_per_rate(torch.optim.SGD, learning_rates, momentum=momentum, weight_decay=weight_decay)


def create_adam_configs(
    learning_rates: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return configs for Adam or AdamW, one per learning rate, for `OptimizerFactory(...).create_optimizer`.

    Args:
        learning_rates: M numbers.
        betas: one pair for all, or a list of M pairs.
        eps, weight_decay: one for all, or a list of M.

    Raises:
        TypeError, ValueError: one number instead of M, none, or numbers that `create_optimizer` refuses.

    Example:
        >>> create_adam_configs([0.1, 0.01])[0]
        {'lr': 0.1, 'betas': (0.9, 0.999), 'eps': 1e-08, 'weight_decay': 0.0}
    """
    return _one_config_per_rate(torch.optim.Adam, learning_rates, betas=betas, eps=eps, weight_decay=weight_decay)


def create_lr_sweep_configs(min_lr: float, max_lr: float, num_models: int, scale: str = "log") -> list[dict[str, Any]]:
    """Return configs whose learning rates go from `min_lr` to `max_lr`, both included.

    Args:
        min_lr: the first model's learning rate. max_lr: the last model's.
        num_models: M; a single model gets `min_lr`.
        scale: "log" (equal ratios) or "linear" (equal differences).

    Returns:
        M dicts `{"lr": …}`.

    Raises:
        TypeError: a number of models that is not a whole number, or rates that are not numbers.
        ValueError: fewer than one model, an unknown scale, rates in the wrong order, or rates that the scale
            cannot hold.

    Example:
        >>> [round(config["lr"], 9) for config in create_lr_sweep_configs(1e-3, 1e-1, 3)]
        [0.001, 0.01, 0.1]
    """
    whole_number(num_models, "num_models")
    if scale not in ("log", "linear"):
        guess = did_you_mean(str(scale), ["log", "linear"])
        raise ValueError(f"Expected scale 'log' or 'linear', got {scale!r}.{guess}")
    for lr in (min_lr, max_lr):
        check_lr(lr, "")
    if min_lr > max_lr:
        raise ValueError(f"Expected min_lr <= max_lr, got {min_lr} and {max_lr}: swap them.")
    if scale == "log" and min_lr <= 0:
        raise ValueError(f"Expected min_lr above 0 on a log scale, got {min_lr}: raise it, or use scale='linear'.")
    spaced = np.geomspace if scale == "log" else np.linspace  # whose ends are right to the last bit
    return [{"lr": lr} for lr in spaced(min_lr, max_lr, num_models).tolist()]


def _one_config_per_rate(optimizer_cls: OptimizerClass, learning_rates: Any, **others: Any) -> list[dict[str, Any]]:
    rates = learning_rates.tolist() if hasattr(learning_rates, "tolist") else learning_rates
    if isinstance(rates, str) or not isinstance(rates, Sequence):
        raise TypeError(f"Expected a list of learning rates (one per model), got {learning_rates!r}: put it in a list.")
    if not rates:
        raise ValueError("Expected at least one learning rate, got none: pass one per model.")
    return merge_configs(optimizer_cls, len(rates), {}, None, {"lr": list(rates), **others})


# ---------------------------------------------------------------------- the checks


def merge_configs(
    optimizer_cls: OptimizerClass,
    num_models: int,
    base_config: dict[str, Any],
    configs: Sequence[dict[str, Any]] | None,
    hyperparameters: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return M dicts of plain values: `base_config`, overridden by `configs` and by the keywords.

    Raises:
        TypeError, ValueError: as `create_optimizer`.
    """
    configs = [{}] * num_models if configs is None else configs
    if not isinstance(configs, (list, tuple)):
        told = f"Expected a list of {num_models} configs (one dict per model), got {type(configs).__name__}"
        raise TypeError(f"{told}: give what is for all models as keywords, create_optimizer(batch, lr=0.1).")
    configs = per_model(list(configs), num_models, "configs")
    for m, config in enumerate(configs):
        check_names(optimizer_cls, config, f"the config of model {m}")
    check_names(optimizer_cls, hyperparameters, "")
    twice = [name for name in hyperparameters if any(name in config for config in configs)]
    if twice:
        raise ValueError(f"Got {twice[0]!r} both in configs and as a keyword: keep one of the two.")
    columns = {}
    for name, value in hyperparameters.items():
        columns[name] = per_model(value, num_models, "learning rates" if name == "lr" else f"values of {name!r}")
    merged = []
    for m, config in enumerate(configs):
        own = {**base_config, **config, **{name: column[m] for name, column in columns.items()}}
        merged.append({name: plain(value) for name, value in own.items()})
        _check_values(optimizer_cls, merged[-1], m)
    return merged


def check_names(
    callee: Callable[..., Any], config: dict[str, Any], where: str, skip: Sequence[str] = ("self", "params")
) -> None:
    """Refuse names that the callee does not take, with a guess at what was meant.

    Args:
        callee: an optimizer class (or a scheduler class, with its own `skip`).
        config: keyword arguments for it.
        where: what the config is, said in the errors; "" for keywords.
        skip: arguments that are not for the config.

    Raises:
        TypeError: not a dict.
        ValueError: an unknown name, "params", or an implementation switch that is on.
    """
    if not isinstance(config, dict):
        raise TypeError(f"Expected a dict as {where}, got {config!r}: write {{'lr': …}}.")
    where = f" in {where}" if where else ""
    name_of = getattr(callee, "__name__", repr(callee))
    taken = _arguments(callee)
    known = [name for name in taken if name not in skip]
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    for name, value in config.items():
        if name in skip:
            raise ValueError(f"Got {name!r}{where}: it is the batch's own, leave it out.")
        if name not in known and not anything:
            options = [option for option in known if option not in SWITCHES]
            raise ValueError(f"{name_of} has no argument {name!r}{where}.{did_you_mean(str(name), options)}")
        if name in SWITCHES and value:
            told = f"Got {name}={value!r}{where}: it chooses how torch loops over a lone model's parameters"
            raise ValueError(f"{told}, and a batch has its own update, equal to torch's for-loop. Leave it out.")


def check_lr(lr: Any, whose: str) -> None:
    """Refuse a learning rate that is not a finite number from 0 on.

    Raises:
        TypeError: not a number.
        ValueError: negative, infinite or NaN.
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise TypeError(f"Expected a number as learning rate{whose}, got {lr!r}: write one like 0.01.")
    if not 0 <= lr < math.inf:
        raise ValueError(f"Expected a finite learning rate from 0 on, got {lr}{whose}: choose one like 0.01.")


def _check_values(optimizer_cls: OptimizerClass, config: dict[str, Any], m: int) -> None:
    taken = _arguments(optimizer_cls)
    if "lr" in config and not (config["lr"] is None and "lr" in taken and taken["lr"].default is None):
        check_lr(config["lr"], f" of model {m}")
    for name, value in config.items():
        usual = taken[name].default if name in taken else None
        if isinstance(usual, tuple) and isinstance(value, (int, float)):
            told = f"Expected a tuple like {usual} as {name!r} of model {m}, got {value}"
            raise TypeError(f"{told}: a tuple is one value for all models, a list has one value per model.")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, float) and math.isnan(part):
                raise ValueError(f"Expected a number as {name!r} of model {m}, got {value}: NaN would spread.")


@functools.lru_cache(maxsize=64)  # asked once per model; 16,384 answers took 3 seconds
def _arguments(callee: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(callee).parameters
