"""Doing to M stacked models what code written for one model does to each: initialise it again, above all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..vmap import HOOKS, OnStack
from .context import CallContext, context_of
from .freeze import held
from .stack import stack_models, unstack_model
from .validate import check_models

_PLAIN = (bool, int, float, str, type(None))


class CanApply:
    """The part of a ModelBatch that runs initialisers."""

    def apply(self, fn: Callable[[nn.Module], Any]) -> CanApply:
        """Let each model `apply(fn)` as it does alone: `fn` sees its layers, and draws from its random stream.

        Args:
            fn: gets one layer of one model; may change numbers in tensors, flags, and plain attributes.

        Raises:
            ValueError: `fn` changes more, such as a tensor's shape or the hooks; nothing has changed then.

        Example:
            >>> from mbkit import ModelBatch
            >>> batch = ModelBatch([nn.Linear(4, 2) for _ in range(3)], seeds=range(3))
            >>> _ = batch.apply(lambda layer: nn.init.orthogonal_(layer.weight))
            >>> torch.allclose(batch[2].weight @ batch[2].weight.T, torch.eye(2), atol=1e-6)
            True
        """
        do_to_each_model(context_of(self), lambda model: model.apply(fn))
        self.training = context_of(self).template.training
        return self


def do_to_each_model(context: CallContext, function: Callable[[nn.Module], Any], path: str = "") -> None:
    """Call `function` with each model as it is alone, with its own random stream, and keep what it has changed.

    Args:
        context: the models; frozen ones stay as they are.
        function: gets a lone model's module; may change numbers in tensors, flags, and plain attributes.
        path: the module's dotted path; "" for the whole model.

    Raises:
        ValueError: the function has changed more, such as a tensor's shape; the models are as before then.
    """
    template, undo = context.template, context.streams.remember()
    device = next((t.device for t in (*template.parameters(), *template.buffers())), torch.device("cpu"))
    with held(context):
        try:
            lone = []
            with context.streams.take_turns(device) as turns:
                for m in turns:
                    lone.append(unstack_model(template, context.attributes, m))
                    function(lone[m].get_submodule(path))
            changes = list(_changes(template, stack_models(*check_models(lone)).template))
        except BaseException:
            undo()
            raise
        for place, name, value in changes:
            if isinstance(value, Tensor):
                place[name].data.copy_(value.data)
                if place[name].is_leaf:
                    place[name].requires_grad_(value.requires_grad)
            else:
                place[name] = value


def _changes(template: nn.Module, changed: nn.Module) -> Iterator[tuple[dict, str, Any]]:
    """Yield what to put where in the template, for it to be like another stack of the models."""
    others = dict(changed.named_modules())
    for path, module in template.named_modules():
        mine, other = vars(module), vars(others.get(path, nn.Module()))
        if path not in others or any(len(mine[hooks]) != len(other[hooks]) for hooks in HOOKS):
            raise _too_much(f"the hooks or layers of '{path or type(module).__name__}' others")
        stores = [(mine[store], other[store]) for store in ("_parameters", "_buffers")]
        for old, new in (*stores, (mine, other)):
            for name in {**old, **new}:
                was, now = old.get(name), new.get(name)
                if isinstance(was, Tensor) and not isinstance(now, Tensor):
                    raise _too_much(f"'{path}.{name}' {now!r}")
                if isinstance(now, Tensor):
                    if not isinstance(was, Tensor) or (was.shape, was.dtype) != (now.shape, now.dtype):
                        raise _too_much(f"'{path}.{name}' {list(now.shape[1:])} of {now.dtype}")
                    yield old, name, now
                elif name in new and not isinstance(now, dict) and all(isinstance(v, _PLAIN) for v in tree_leaves(now)):
                    yield old, name, now


def _too_much(what: str) -> ValueError:
    told = f"Expected a function that changes numbers only, got one that makes {what}"
    return ValueError(f"{told}: do that to each model, before the batch is made.")


def reset_each_model(context: CallContext) -> None:
    """Have each layer's `reset_parameters`, which would take M models for one, do to each model what it does alone."""
    reset = methodcaller("reset_parameters")
    for path, module in context.template.named_modules():
        if callable(getattr(type(module), "reset_parameters", None)):
            vars(module)["reset_parameters"] = OnStack(do_to_each_model, context, reset, path)
