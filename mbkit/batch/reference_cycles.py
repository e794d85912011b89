"""References that run in circles, and batches inside batches: refused by name before anything walks over a model."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..common.functions import at_hand

__all__ = ["refuse_circles"]

_OPAQUE = (Tensor, nn.Module, type, types.ModuleType, types.BuiltinFunctionType)
_OF_TORCH = set(vars(nn.Module()))
_STORES = ("_parameters", "_buffers", "_modules")
_LEADS_BACK = {
    "object": "an object that refers to the model itself and would do so in every copy: set the reference to None, or "
    "pass what is needed as an argument.",
    "function": "a function that holds on to the model itself (a lambda over self, say), and would do so in every "
    "copy: make it a method, or pass what it needs as an argument.",
}


def refuse_circles(models: Iterable[nn.Module]) -> None:
    """Refuse what has no end when it is copied or walked over, and what would lead a copy back to the original.

    Raises:
        TypeError: a ModelBatch as a model or as a part of one.
        ValueError: a module inside itself, a list or dict inside itself, an object or function that refers to the
            model, or a generator, which is no model's own stream.
    """
    for m, model in enumerate(models):
        _refuse_modules(m, "", model, ())
        if m == 0:  # the others have to be like it
            _refuse_attributes(model)


def _refuse_modules(m: int, path: str, module: nn.Module, above: tuple[nn.Module, ...]) -> None:
    where = f"'{path}' of model {m}" if path else f"model {m}"
    if hasattr(module, "stacked_params") and hasattr(module, "num_models"):
        raise TypeError(
            f"Expected plain modules, got a ModelBatch as {where}: take its models out first, [*batch], or build one "
            "ModelBatch of all of them."
        )
    if any(module is one for one in above):
        raise ValueError(
            f"Expected modules without circles, got {where}, which is a module that contains it: keep the reference "
            "in a list, [module], so that it is not a part of itself."
        )
    for name, child in module._modules.items():
        if child is not None:
            _refuse_modules(m, f"{path}.{name}" if path else name, child, (*above, module))


def _refuse_attributes(model: nn.Module) -> None:
    modules = set(map(id, model.modules()))
    own = {"object": modules, "function": modules | set(map(id, (*model.parameters(), *model.buffers())))}
    kept = [(path, name, value) for path, module in model.named_modules() for name, value in vars(module).items()]
    kept += [(path, "_backward_hooks", p._backward_hooks) for path, p in model.named_parameters()]
    for path, name, value in kept:
        where = f"'{path}'" if path else "the model"
        if name not in _STORES:
            for what in _faults(value, own, (), "", name in _OF_TORCH, set()):
                raise ValueError(f"{where} keeps in {name!r} {what}")


def _faults(
    value: Any, own: dict, above: tuple[int, ...], inside: str, of_torch: bool, seen: set[int]
) -> Iterator[str]:
    """Yield in words what is wrong with an attribute's value: nothing, or one fault and more.

    Args:
        value: the value, or something that it holds.
        own: the ids of what is a part of the model, as seen from inside of objects and functions.
        above: the ids of the lists and dicts around it.
        inside: "object" or "function" where it is held by one, else "".
        of_torch: whether the attribute is one of nn.Module's, such as the hooks: objects there may know their model.
        seen: the ids of the objects and functions that have been looked at.
    """
    if inside and id(getattr(value, "__self__", value)) in own[inside]:
        yield _LEADS_BACK[inside]
    elif isinstance(value, torch.Generator) and not inside:
        yield (
            "a torch.Generator, which the models would share: draw from the default generator, which is each model's "
            "own, seeded with seeds[m]."
        )
    elif isinstance(value, (list, tuple, dict)):
        if id(value) in above:
            yield f"a {type(value).__name__} that contains itself: keep a copy of it, or None, in its place."
            return
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _faults(inner, own, (*above, id(value)), inside, of_torch, seen)
    elif id(value) not in seen:
        seen.add(id(value))
        held, kind = (), "function"
        if isinstance(value, functools.partial):
            held = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, types.FunctionType):
            held = at_hand(value)
        elif hasattr(value, "__dict__") and not isinstance(value, _OPAQUE) and inside != "function" and not of_torch:
            held, kind = vars(value).values(), "object"
        for inner in held:
            yield from _faults(inner, own, (), kind, of_torch, seen)
