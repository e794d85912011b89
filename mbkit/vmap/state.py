"""Everything that a call of a module can change: read off before and after, and written back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..common.functions import at_hand
from .errors import PATH, BatchingError

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

    Args:
        root: the module; None for none.

    Attributes:
        modules: the module and all below it, by their paths.
        own: by the paths, the names of the plain attributes in it.
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        super().__init__()
        self.modules: dict[str, nn.Module] = {} if root is None else modules_of(root)
        self.own: dict[str, list[str]] = {}
        for path, module in self.modules.items():
            mine = vars(module)
            for store in ("_parameters", "_buffers"):
                for name, value in mine[store].items():
                    self[path, store, name] = value
            self.own[path] = own_attributes(module)
            for name in self.own[path]:
                self[path, "__dict__", name] = mine[name]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors in it, each once."""
        return tensors_in(self)


def modules_of(root: nn.Module) -> dict[str, nn.Module]:
    """Return what `named_modules` yields, whose nested generators take three times as long, in every call."""
    found: dict[str, nn.Module] = {}
    _walk(root, "", found, set())
    return found


def _walk(module: nn.Module, path: str, found: dict[str, nn.Module], seen: set[int]) -> None:
    if type(module).named_modules is not nn.Module.named_modules:  # the user's own, which may leave modules out
        new = [(name, below) for name, below in module.named_modules(prefix=path) if id(below) not in seen]
        found.update(new)
        seen.update(id(below) for _, below in new)
        return
    found[path] = module
    seen.add(id(module))
    for name, below in module._modules.items():
        if below is not None and id(below) not in seen:
            _walk(below, f"{path}.{name}" if path else name, found, seen)


def write_state(before: State, after: Mapping[Key, Any]) -> None:
    """Assign in the modules of `before` what differs between two states; errors as for `write_changes`."""
    changes = {key: value for key, value in after.items() if key not in before or value is not before[key]}
    write_changes(before, changes | dict.fromkeys(before.keys() - after.keys(), Absent))


def write_changes(before: State, changes: Mapping[Key, Any]) -> None:
    """Assign values in the modules of `before`, or delete what is to be `Absent`.

    Raises:
        BatchingError: a parameter has come, gone or been replaced.
    """
    for (path, store, name), value in changes.items():
        if store == "_parameters" or path not in before.modules:
            raise BatchingError(f"forward makes, replaces or deletes '{path}.{name}': build all layers in __init__")
        target = getattr(before.modules[path], store)
        if value is Absent:
            del target[name]
        else:
            target[name] = value


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
    if _is_of_torch(type(module)) and not (
        mine["_forward_hooks"] or mine["_forward_pre_hooks"] or mine["_backward_hooks"] or mine["_backward_pre_hooks"]
    ):
        return []
    return [name for name in mine if name not in _OF_TORCH and type(mine[name]) is not OnStack]


@cache
def _is_of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.")


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
