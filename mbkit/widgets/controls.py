"""The explorers' controls, each of which refuses what it could not show; and code that names what they were given."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as ipw
import torch
from IPython import get_ipython

from ..common.checks import did_you_mean, whole_number
from ..lessons.trainability import spaced

WIDE = {"description_width": "9em"}
OPTIMIZERS = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam")
MOST_NETWORKS, MOST_LOSSES = 256 * 256, 2**28  # the losses of all steps are kept: a gigabyte in float32


def slider(name: str, value: int, low: int, high: int, shown: str = "") -> ipw.IntSlider:
    """Return a slider; where it stands outside its ends it would move there without a word, so that is refused."""
    if not low <= whole_number(value, name, low) <= high:
        raise ValueError(f"Expected {name} from {low} to {high}, got {value}.")
    return ipw.IntSlider(value, low, high, description=shown or name, style=WIDE)


def choice(name: str, options: Sequence[str] | Mapping[str, str], value: str) -> ipw.Dropdown:
    """Return a drop-down; of a mapping it shows the keys and has the values."""
    values = list(options.values()) if isinstance(options, Mapping) else list(options)
    if value not in values:
        raise ValueError(f"Expected {' or '.join(values)} as {name}, got {value!r}.")
    shown = list(options.items()) if isinstance(options, Mapping) else values
    return ipw.Dropdown(options=shown, value=value, description=name, style=WIDE)


def log_range(low: float, high: float, *others: float) -> ipw.SelectionRangeSlider:
    """Return a slider of learning rates with two ends on a log scale, which can stand on `others` too."""
    spaced(low, high, 2)  # or it is refused
    ticks = {float(f"{10 ** (n / 4):.2g}") for n in range(-20, 5)} | {low, high, *others}
    options = [(f"{rate:.3g}", rate) for rate in sorted(ticks)]
    named = {"description": "learning rates", "style": WIDE, "layout": ipw.Layout(width="26em")}
    return ipw.SelectionRangeSlider(options=options, value=(low, high), **named)


def check_size(networks: int, steps: int) -> None:
    """Refuse a grid that would take more memory or time than anybody wants of a slider, before anything is allocated.

    Raises:
        ValueError: there are too many networks, or losses to be kept.
    """
    if networks > MOST_NETWORKS:
        raise ValueError(f"Expected at most {MOST_NETWORKS:,} networks, got {networks:,}: make the grid smaller.")
    if networks * steps > MOST_LOSSES:
        told = f"Expected at most {MOST_LOSSES // networks:,} steps for {networks:,} networks, got {steps:,}"
        raise ValueError(f"{told}: every loss is kept, so use fewer steps or networks.")


def spread(low: float, high: float, number: int) -> tuple[float, ...]:
    """Return rates from low to high, evenly spaced on a log scale and rounded to three digits."""
    return tuple(float(f"{rate:.3g}") for rate in spaced(low, high, number).tolist())


def nearest(rates: Sequence[float], rate: float) -> int:
    """Return the index of the rate that is nearest to one, on a log scale.

    Raises:
        ValueError: a rate that is not above 0.
    """
    if not 0 < rate < float("inf"):
        ends = f"{rates[0]:g} to {rates[-1]:g}"
        raise ValueError(f"Expected a rate above 0 as the mark's, got {rate}: pass one of {ends}.")
    return min(range(len(rates)), key=lambda index: abs(math.log(rates[index] / rate)))


def known(optimizer: str, hyperparameters: Mapping[str, Any], all_of_them: bool = False) -> dict[str, Any]:
    """Return those of the hyperparameters that a class of torch.optim has: Adam knows no momentum.

    Raises:
        TypeError: it should have all of them, and does not.
    """
    names = inspect.signature(getattr(torch.optim, optimizer)).parameters
    for name in hyperparameters:
        if all_of_them and name not in names:
            raise TypeError(f"Expected hyperparameters of {optimizer}, got {name!r}.{did_you_mean(name, names)}")
    return {name: value for name, value in hyperparameters.items() if name in names}


def code(thing: Any) -> str:
    """Return what a line of code in the notebook can call a function or an object: its variable, or its full name.

    Example:
        >>> code(torch.nn.functional.mse_loss), code(lambda: 0)
        ('torch.nn.functional.mse_loss', '<lambda>')
    """
    variables = getattr(get_ipython(), "user_ns", {})
    names = [name for name, own in dict(variables).items() if own is thing and not name.startswith("_")]
    home, name = getattr(thing, "__module__", "__main__"), getattr(thing, "__qualname__", f"<{type(thing).__name__}>")
    full = name.rpartition(".")[2] if home == "__main__" or "<" in name else f"{home}.{name}"
    return names[0] if names else full


def objects(build: Any, batches: Any, loss_fn: Any, usual: Any) -> list[str]:
    """Return the arguments build, batches and loss_fn, as code; nothing where they are the usual ones.

    Raises:
        ValueError: only one of build and batches.
    """
    if (build is None) != (batches is None):
        raise ValueError("Expected both build and batches, or neither for the demo's: got one of them.")
    own = [] if build is None else [code(build), code(batches)]
    return own if loss_fn is usual else [*own, f"loss_fn={code(loss_fn)}"]
