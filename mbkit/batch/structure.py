"""How the values in plain attributes are built: whether two mean the same, and what a copy of a model cannot follow."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..common.functions import at_hand

Names = dict[int, str]  # from the id of a module or tensor that a model registers to its dotted name

_OPENED = (dict, list, tuple, deque, weakref.ReferenceType, types.MethodType)  # whose own == would ask what they hold
_OPAQUE = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_PLAIN += (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_OF_TORCH = set(vars(nn.Module()))
_STORES = ("_parameters", "_buffers", "_modules")
_LEADS_BACK = {
    "object": "an object that refers to the model itself and would do so in every copy: set the reference to None, or "
    "pass what is needed as an argument.",
    "function": "a function that holds on to the model itself (a lambda over self, say), and would do so in every "
    "copy: make it a method, or pass what it needs as an argument.",
}


@dataclass(frozen=True)
class Comparison:
    """Says whether values found in two models mean the same; what cannot be told apart from different counts as that.

    Args:
        names_a, names_b: the modules and tensors that each model registers, which are compared elsewhere.
        strict: whether equal lists and dicts that functions hold on to count as different, because a function that
            runs once for all models would fill only one of them.
    """

    names_a: Names
    names_b: Names
    strict: bool = False

    def same(self, a: Any, b: Any, above: frozenset[int] = frozenset()) -> bool:
        """Say whether `a` means what `b` means; what is being compared further up is taken as same, so cycles end."""
        if a is b or id(a) in above:
            return True
        if type(a) is not type(b) and not isinstance(a, (type, nn.Module)):
            return False
        if not isinstance(a, type) and (id(a) in self.names_a or id(b) in self.names_b):
            return self.names_a.get(id(a)) == self.names_b.get(id(b))
        if isinstance(a, Tensor):
            alike = (a.shape, a.dtype, a.device, a.layout) == (b.shape, b.dtype, b.device, b.layout)
            return alike and torch.equal(a, b)
        if not isinstance(a, _OPENED) and type(a).__eq__ is not object.__eq__:
            try:
                equal = a == b
                if isinstance(equal, bool):
                    return equal or (a != a and b != b)  # two NaNs
                return bool(equal.all())  # numpy
            except Exception:  # a field that cannot be compared this way, such as a tensor
                pass
        try:
            (kind_a, in_a), (kind_b, in_b) = _open(a), _open(b)
        except Exception:  # nothing that could be compared: a file, a lock, a random generator
            return False
        if kind_a != kind_b or len(in_a) != len(in_b):
            return False
        strict = self.strict and inspect.isfunction(a)
        above = above | {id(a)}
        return all(
            self.same(x, y, above) and not (strict and x is not y and isinstance(x, (list, dict, set, deque)))
            for x, y in zip(in_a, in_b, strict=True)
        )


def _open(value: Any) -> tuple[Any, list[Any]]:
    """Return what tells a value from others of its type, and the values inside."""
    if isinstance(value, dict):
        return list(value), list(value.values())
    if isinstance(value, (list, tuple, deque)):
        return None, list(value)
    if isinstance(value, weakref.ReferenceType):
        return None, [value()]
    if isinstance(value, RemovableHandle):  # which hook it is of how many, whatever the numbers that torch counts by
        hooks = value.hooks_dict_ref() or {}
        return list(hooks).index(value.id) if value.id in hooks else None, [list(hooks.values())]
    if inspect.ismethod(value):
        return None, [value.__func__, value.__self__]
    if inspect.isfunction(value):
        return value.__code__, [*at_hand(value), *vars(value).items()]
    if isinstance(value, type):  # one definition may run twice, inside a function
        methods = [one for one in vars(value).values() if inspect.isfunction(one)]
        return (value.__module__, value.__qualname__, vars(value).keys()), [*value.__bases__, *methods]
    if isinstance(value, nn.Module):
        return None, [type(value), vars(value)]
    parts = value.__reduce_ex__(4)  # what pickle would save
    return (parts, []) if isinstance(parts, str) else (None, [[*p] if hasattr(p, "__next__") else p for p in parts])


def may_differ(module: nn.Module, name: str, a: Any, b: Any, compared: Comparison) -> bool:
    """Say whether each model may have its own: a float, or an object or dict of plain values; see also `_is_own`."""
    if {type(a), type(b)} in ({float}, {float, int}):
        return True
    is_open = isinstance(a, dict) or hasattr(a, "__dict__")
    is_config = type(a) is type(b) and is_open and not callable(a) and _is_plain(a, set()) and _is_plain(b, set())
    return is_config or _is_own(module, name, a, b, compared)


def _is_plain(value: Any, seen: set[int]) -> bool:
    """Say whether nothing that a value holds is a tensor or a module, whose place is another one."""
    if isinstance(value, _PLAIN) or id(value) in seen or type(value).__module__ in ("typing", "types"):
        return True
    seen.add(id(value))
    if isinstance(value, (dict, list, tuple, set)):
        return all(_is_plain(one, seen) for one in (value.values() if isinstance(value, dict) else value))
    held = getattr(value, "__dict__", None)
    return isinstance(held, dict) and not isinstance(value, (Tensor, nn.Module)) and _is_plain(held, seen)


def _is_own(module: nn.Module, name: str, a: Any, b: Any, compared: Comparison) -> bool:
    """Say whether an attribute of the user's own class may differ: a whole number, a text, or what a call fills in.

    Calls fill in flags and tables where nothing was. All models at once cannot read such an attribute, so a layer that
    does runs model by model.
    """
    if type(module).__module__.startswith("torch.") or hasattr(type(module), name):
        return False
    filled = [value for value in (a, b) if value is not None and value is not False]
    if len(filled) == 1:
        known = compared.names_a.keys() | compared.names_b.keys()
        return filled[0] is True or (isinstance(filled[0], Tensor) and filled[0].is_leaf and id(filled[0]) not in known)
    return {type(a), type(b)} in ({int}, {str})


def refuse_circles(m: int, module: nn.Module, path: str = "", above: tuple[nn.Module, ...] = ()) -> None:
    """Refuse a module inside itself (ValueError), and a ModelBatch as model m or as a part of it (TypeError)."""
    where = f"'{path}' of model {m}" if path else f"model {m}"
    if hasattr(type(module), "stacked_params"):
        told = f"Expected plain modules, got a ModelBatch as {where}"
        raise TypeError(f"{told}: take its models out first, [*batch], or build one ModelBatch of all of them.")
    if any(module is one for one in above):
        told = f"Expected modules without circles, got {where}, which is a module that contains it"
        raise ValueError(f"{told}: keep the reference in a list, [module], so that it is not a part of itself.")
    for name, child in module._modules.items():
        if child is not None:
            refuse_circles(m, child, f"{path}.{name}" if path else name, (*above, module))


def refuse_references(model: nn.Module) -> None:
    """Refuse attributes that have no end when they are copied, and those that would lead a copy back to the original.

    Raises:
        ValueError: a list or dict inside itself, an object or function that refers to the model, or a generator,
            which is no model's own stream.
    """
    modules = set(map(id, model.modules()))
    own = {"object": modules, "function": modules | set(map(id, (*model.parameters(), *model.buffers())))}
    kept = [(path, name, value) for path, module in model.named_modules() for name, value in vars(module).items()]
    kept += [(path, "_backward_hooks", p._backward_hooks) for path, p in model.named_parameters()]
    for path, name, value in kept:
        if name not in _STORES:
            for what in _faults(value, own, (), "", name in _OF_TORCH, set()):
                raise ValueError(f"{f'{path!r}' if path else 'the model'} keeps in {name!r} {what}")


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
        for one in _open(value)[1]:
            yield from _faults(one, own, (*above, id(value)), inside, of_torch, seen)
    elif id(value) not in seen:
        seen.add(id(value))
        held, kind = at_hand(value), "function"
        if isinstance(value, functools.partial):
            held = (value.func, *value.args, *value.keywords.values())
        elif hasattr(value, "__dict__") and not isinstance(value, _OPAQUE) and inside != "function" and not of_torch:
            held, kind = vars(value).values(), "object"
        for one in held:
            yield from _faults(one, own, (), kind, of_torch, seen)
