"""References that run in circles, and batches inside batches: refused by name before anything walks over a model."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["refuse_circles"]

_OPAQUE = (Tensor, nn.Module, functools.partial, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def refuse_circles(models: Iterable[nn.Module]) -> None:
    """Refuse what has no end when it is copied or walked over, and what would lead a copy back to the original.

    Raises:
        TypeError: a ModelBatch as a model or as a part of one.
        ValueError: a module inside itself, a list or dict inside itself, or an object that refers to the model.
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
    own = set(map(id, model.modules()))
    for path, module in model.named_modules():
        where = f"'{path}'" if path else "the model"
        for name, value in vars(module).items():
            if name not in vars(nn.Module()):
                for what in _faults(value, own, (), False, set()):
                    raise ValueError(f"Expected attributes that can be copied, got {name!r} of {where}, {what}")


def _faults(value: Any, own: set[int], above: tuple[int, ...], in_object: bool, seen: set[int]) -> Iterator[str]:
    """Yield in words what is wrong with an attribute's value: nothing, or one fault and more."""
    if in_object and id(getattr(value, "__self__", value)) in own:
        yield (
            "an object that refers to the model itself and would do so in every copy: set the reference to None, "
            "or pass what is needed as an argument."
        )
    if isinstance(value, (*_OPAQUE, str, bytes)):
        return
    if isinstance(value, (list, tuple, dict)):
        if id(value) in above:
            yield f"a {type(value).__name__} that contains itself: keep a copy of it, or None, in its place."
            return
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _faults(inner, own, (*above, id(value)), in_object, seen)
    elif hasattr(value, "__dict__") and id(value) not in seen:
        seen.add(id(value))
        for inner in vars(value).values():
            yield from _faults(inner, own, (), True, seen)
