"""Everything that a call of a module can change: read off before and after, and written back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..common.objects import PerModelValue
from .errors import PATH, BatchingError

__all__ = [
    "HOOKS", "OUTPUT", "PLAIN", "Absent", "Key", "OnStack", "PerModelValue", "State", "dotted", "is_leaf",
    "own_attributes", "read_state", "tensors_in", "write_state",
]  # fmt: skip

Key = tuple[str, str, str]  # module path, "_parameters", "_buffers" or "__dict__", name

OUTPUT: Key = ("", "output", "output")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_TORCH = set(vars(nn.Module())) | {PATH}
PLAIN = (int, float, bool, str, type(None), complex, bytes, torch.Size, torch.dtype, torch.device)


class OnStack(partial):
    """Stands on a module that holds stacks, in place of a method that would take them for one model's tensors."""


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
