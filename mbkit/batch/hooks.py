"""Hooks on layers that see, or keep, what passes through: their layers run for one model after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from ..common.functions import at_hand
from ..vmap import BatchingError
from .context import CallContext
from .kept import Kept
from .stack import may_keep

_COLLECTIONS = (list, dict, set, deque)


def hooked(modules: dict[str, nn.Module]) -> set[str]:
    """Return the paths of the modules with backward hooks, which vmap passes over in silence, or hooks that keep."""
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return {""}
    return {
        path
        for path, module in modules.items()
        if module._backward_hooks
        or module._backward_pre_hooks
        or ((module._forward_hooks or module._forward_pre_hooks) and any(True for _ in _keepers(module)))
    }


def _keepers(module: nn.Module) -> Iterator[Any]:
    """Yield what forward hooks may keep tensors in: their objects, and the lists, dicts and sets at hand."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        held = []
        while isinstance(hook, partial):
            held += [*hook.args, *hook.keywords.values()]
            hook = hook.func
        holder, function = getattr(hook, "__self__", hook), getattr(hook, "__func__", hook)
        if may_keep(holder):
            yield holder
        held += at_hand(function)
        if isinstance(function, FunctionType):
            held += [function.__globals__.get(name) for name in function.__code__.co_names]
        yield from (value for value in held if isinstance(value, _COLLECTIONS))


def refuse_late_reader(context: CallContext, kept: Kept) -> None:
    """Refuse a loss function that reads what hooks have kept of all models, in a call before the loss was known.

    Raises:
        BatchingError: it does.
    """
    if "" in context.model_by_model:  # each model has kept its own
        return
    layers = [module for path, module in context.template.named_modules() if path in context.model_by_model]
    for keeper in [found for layer in layers for found in _keepers(layer)]:
        if kept.has(keeper) and (keeper or not isinstance(keeper, _COLLECTIONS)):
            told = f"loss_fn reads a {type(keeper).__name__} in which a hook has kept what is of all models, in a call"
            raise BatchingError(f"{told} before this loss: empty it and call the batch again. fit needs none of that.")
