"""The rules, by the operators that they stand for, and what a rule is told about the pass of M models that calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .errors import BatchingError

_saved_tensors_hooks = partial(torch._C._autograd._top_saved_tensors_default_hooks, True)


@dataclass(eq=False)
class Pass:
    """One pass of M models under vmap.

    Attributes:
        num_models: M.
        streams: the models' random generators.
        device: where the models are.
        level: of vmap, among the transforms that are on.
        per_model_settings: whether a module or the loss has a `PerModel` setting; spares looking for them otherwise.
        folding, folded: whether convolutions may fold the models into their channels; the memory format that these
            activations have alone, None before the first.
        own_rows: whether operators get a shared tensor that requires gradients as rows of each model's own.
        laid_out: by the id of such a tensor: the tensor, and what one model sees of its rows.
        traced: whether the pass is traced to be compiled, so that some rules emit what the compiler makes fast.
        channels_last: whether images or weights lie in channels_last alone.
        copies: storages of copies of what is a view alone, and of what was copied; see `layout`.
        rectified: what ReLUs of a traced pass were given; see `rules/pooling`.
        reads_gradients: whether `.grad` may be read: by an optimizer, to which it has been given.
        hooks: on saved tensors, the caller's, which pack whole stacks.
    """

    num_models: int
    streams: Any
    device: torch.device
    level: int
    per_model_settings: bool = False
    folding: bool = False
    own_rows: bool = False
    traced: bool = False
    folded: torch.memory_format | None = None
    channels_last: bool = False
    reads_gradients: bool = False
    copies: set[Any] = field(default_factory=set)
    laid_out: dict[int, tuple] = field(default_factory=dict)
    rectified: dict[int, tuple] = field(default_factory=dict)
    hooks: Any = field(default_factory=_saved_tensors_hooks)

    def __post_init__(self) -> None:
        # With one model a folded activation could not be told from a channels_last one, and gains nothing.
        self.folding = self.folding and self.num_models > 1 and self.device.type == "cpu"

    def check_hooks(self) -> None:
        """Refuse to go on under hooks that the model itself has put on saved tensors."""
        if _saved_tensors_hooks() != self.hooks:
            raise BatchingError(
                "it uses torch.utils.checkpoint or saved_tensors_hooks, which compute again during the backward pass, "
                "when the M models are no longer apart: name the layer in model_by_model=[...]"
            )


# A rule gets the pass, the operator, its arguments and its keyword arguments, and returns what the operator returns;
# NotImplemented where torch's own way is right.
Rule = Callable[[Pass, Callable, tuple, dict], Any]

RULES: dict[Callable, Rule] = {}
RULES_INSIDE: dict[Callable, Rule] = {}  # asked instead inside torch.func (grad, vmap, ...) in the model
RULES_WHEN_TRACED: dict[Callable, Rule] = {}  # asked first in a traced pass
RULES_WITH_SETTINGS: dict[Callable, Rule] = {}  # asked instead where an argument is a `PerModel`


# What puts an operator's arguments in order, and gives back those that rules take by their names.
_ORDERS: dict[Callable, Callable[..., tuple[tuple, dict]]] = {}


def rule(
    *operators: Callable, table: dict[Callable, Rule] = RULES, order: Callable[..., tuple[tuple, dict]] | None = None
) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of some operators."""

    def register(function: Rule) -> Rule:
        table.update(dict.fromkeys(operators, function))
        if order is not None:
            _ORDERS.update(dict.fromkeys(operators, order))
        return function

    return register


def in_order(operator: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return an operator's arguments as its rule expects them, whichever of them were given by their names."""
    kwargs = dict(kwargs)
    try:
        return _ORDERS[operator](*args, **kwargs)
    except (KeyError, TypeError):  # of a wrong call, torch says what is wrong with it
        by_name = not args and "input" in kwargs
        return (kwargs.pop("input"),) if by_name else args, kwargs
