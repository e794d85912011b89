"""Everything that a call of a module can change: read off before and after, and written back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..common.functions import at_hand
from ..common.objects import PerModelValue
from .errors import PATH, BatchingError

__all__ = [
    "HOOKS", "OUTPUT", "PLAIN", "Absent", "Key", "OnStack", "PerModelValue", "State", "dotted", "is_leaf",
    "keep_hooks", "new_hooks", "own_attributes", "read_state", "tensors_in", "write_state",
]  # fmt: skip

Hooks = list[tuple[str, str, int, Any]]  # module path, one of HOOKS, torch's number of a hook, the hook
Key = tuple[str, str, str]  # module path, "_parameters", "_buffers" or "__dict__", name

OUTPUT: Key = ("", "output", "output")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_TORCH = set(vars(nn.Module())) | {PATH}
PLAIN = (int, float, bool, str, type(None), complex, bytes, torch.Size, torch.dtype, torch.device)


class OnStack(partial):
    """Stands on a module that holds stacks, in place of a method that would take them for one model's tensors."""

    one_for_all = True  # where an object that holds the module is taken apart


class Absent:
    """Stands for an attribute that a model does not have."""


class State(dict[Key, Any]):
    """Everything that a call of a module can change.

    Attributes:
        modules: the module and all below it, by their paths.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]] = ()) -> None:
        super().__init__()
        self.modules = dict(modules)
        for path, module in self.modules.items():
            mine = vars(module)
            for store in ("_parameters", "_buffers"):
                for name, value in mine[store].items():
                    self[path, store, name] = value
            for name in own_attributes(module):
                self[path, "__dict__", name] = mine[name]


def read_state(model: nn.Module) -> State:
    """Return everything that a call of the model can change."""
    return State(model.named_modules())


def write_state(before: State, after: Mapping[Key, Any]) -> None:
    """Assign in the modules of `before` what differs between two states.

    Raises:
        BatchingError: a parameter has come, gone or been replaced.
    """
    for key in before.keys() | after.keys():
        path, store, name = key
        if key in after and key in before and after[key] is before[key]:
            continue
        if store == "_parameters" or path not in before.modules:
            raise BatchingError(f"forward makes, replaces or deletes '{path}.{name}': build all layers in __init__")
        target = getattr(before.modules[path], store)
        if key in after:
            target[name] = after[key]
        else:
            del target[name]


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested value, each once."""
    found: dict[int, Tensor] = {}
    for value in tree.values() if isinstance(tree, dict) else [tree]:
        for leaf in [value] if isinstance(value, Tensor) else () if type(value) in PLAIN else tree_leaves(value):
            if isinstance(leaf, Tensor):
                found[id(leaf)] = leaf
    return list(found.values())


def own_attributes(module: nn.Module) -> list[str]:
    """Return the plain attributes that a call might change; torch's own layers have none unless they are hooked."""
    mine = vars(module)
    if type(module).__module__.startswith("torch.nn.") and not (
        mine["_forward_hooks"] or mine["_forward_pre_hooks"] or mine["_backward_hooks"] or mine["_backward_pre_hooks"]
    ):
        return []
    return [name for name in mine if name not in _OF_TORCH and type(mine[name]) is not OnStack]


def is_leaf(value: Any) -> bool:
    """Say whether a value is a tensor or a plain number, text or the like."""
    return isinstance(value, Tensor) or type(value) in PLAIN


def dotted(key: Key) -> str:
    """Return a key's path and name as one, for errors."""
    return ".".join(part for part in (key[0], key[2]) if part)


def new_hooks(before: State, module: nn.Module) -> Hooks:
    """Return the hooks that calls have registered on a copy of a module."""
    copies = dict(module.named_modules())
    places = [(path, kind, vars(old)[kind]) for path, old in before.modules.items() for kind in HOOKS]
    return [
        (path, kind, key, hook)
        for path, kind, known in places
        for key, hook in vars(copies[path])[kind].items()
        if key not in known
    ]


def keep_hooks(before: State, each: Sequence[Hooks]) -> None:
    """Register for good what each model's call, or each chunk's, has registered, where one can serve them all.

    Raises:
        BatchingError: the calls have registered other hooks, or hooks that hold on to one model.
    """
    facts = [[(path, kind, getattr(hook, "__code__", hook)) for path, kind, _, hook in hooks] for hooks in each]
    own = [held for *_, hook in each[0] for held in at_hand(hook) if isinstance(held, (Tensor, nn.Module))]
    if own or any(fact != facts[0] for fact in facts):
        raise BatchingError("a call registers a hook of its own for each model: register it before the batch is made")
    for path, kind, key, hook in each[0]:
        vars(before.modules[path])[kind][key] = hook
