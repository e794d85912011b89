"""A copy of a module for one model, and what a call has changed in it: the way from M models to one and back.

A replica shares everything with the module it copies but its tensors, its children and its plain attributes, so a
call can assign what it likes without touching the module. Whatever it did assign (a buffer, a tensor or number in
a plain attribute, an entry of a list) is read off afterwards and kept for each model.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import PATH, BatchingError
from .per_model import PerModel

__all__ = [
    "HOOKS", "OUTPUT", "PerModelValue", "State", "copy_module", "flattened", "held_inside", "is_leaf", "materialize",
    "merge", "mix", "named_modules", "outcome", "own_attributes", "read_state", "write_state",
]  # fmt: skip

State = dict[tuple[str, str, str], Any]  # (module path, "_parameters", "_buffers" or "__dict__", name) -> value

_OF_TORCH = set(vars(nn.Module())) | {"_call_impl", PATH}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FOLLOWED = (Tensor, nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
_PLAIN = (int, float, bool, str, type(None))


OUTPUT = ("", "output", "output")
_NEW = object()


class PerModelValue:
    """M values of a plain attribute that cannot be stacked, such as numbers that the models computed themselves."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)


def mix(flags: Sequence[bool], yes: Any, no: Any) -> PerModelValue:
    """Return M values: from `yes` where the flag is set, else from `no`; either may be one value for all."""
    columns = [v.values if isinstance(v, PerModelValue) else [v] * len(flags) for v in (yes, no)]
    return PerModelValue([a if flag else b for flag, a, b in zip(flags, *columns, strict=True)])


class Placeholder(int):
    """Stands for the i-th new tensor of a call until the M of it are stacked."""


def own_attributes(module: nn.Module) -> list[str]:
    """Return the plain attributes that a call might change; torch's own layers have none unless they are hooked."""
    mine = vars(module)
    if type(module).__module__.startswith("torch.nn.") and not any(mine[hooks] for hooks in HOOKS):
        return []
    return [name for name in mine if name not in _OF_TORCH]


def read_state(model: nn.Module) -> State:
    """Return everything that a call of the model can change."""
    state: State = {}
    for path, module in named_modules(model):
        mine = vars(module)
        for store in ("_parameters", "_buffers"):
            for name, value in mine[store].items():
                state[path, store, name] = value
        for name in own_attributes(module):
            state[path, "__dict__", name] = mine[name]
    return state


def named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what `root.named_modules()` yields, several times as fast: a call of the batch needs it three times."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found.append((path, module))
        for name, child in module._modules.items():
            if child is not None:
                visit(f"{path}.{name}" if path else name, child)

    visit("", root)
    return found


def write_state(model: nn.Module, before: State, after: State) -> None:
    """Assign what differs between two states.

    Raises:
        BatchingError: a parameter has come, gone or been replaced.
    """
    modules = dict(model.named_modules())
    for key in before.keys() | after.keys():
        path, store, name = key
        if key in after and key in before and after[key] is before[key]:
            continue
        if store == "_parameters" or path not in modules:
            raise BatchingError(f"forward makes, replaces or deletes '{path}.{name}': build all layers in __init__")
        target = getattr(modules[path], store)
        if key in after:
            target[name] = after[key]
        else:
            del target[name]


def copy_module(
    root: nn.Module, own: dict[int, Tensor], m: int | slice = slice(None), *, alone: bool = False
) -> nn.Module:
    """Return a copy of a module that holds one model's tensors, and `m`'s own values where the models differ.

    Args:
        root: the module.
        own: from the id of a tensor in it to the one that takes its place.
        m: the model's number, or those of several for what stands for all of them.
        alone: the replica is to live on its own, so it gets no note of where it came from.
    """
    modules = dict(named_modules(root))
    twins = {id(module): object.__new__(type(module)) for module in modules.values()}

    def follow(leaf: Any) -> Any:
        if isinstance(leaf, PerModelValue):
            return leaf.values[m] if isinstance(m, int) else PerModelValue(leaf.values[m])
        if _is_method(leaf) and id(leaf.__self__) in twins:
            return types.MethodType(leaf.__func__, twins[id(leaf.__self__)])
        return twins.get(id(leaf), own.get(id(leaf), leaf))

    for path, module in modules.items():
        mine = vars(twins[id(module)])
        mine.update(vars(module))
        mine.pop("_call_impl", None)
        if not alone:
            mine.setdefault(PATH, path)
        for store in ("_parameters", "_buffers"):
            mine[store] = {name: own.get(id(t), t) for name, t in getattr(module, store).items()}
        mine["_modules"] = {name: twins.get(id(child), child) for name, child in module._modules.items()}
        for name in own_attributes(module):
            if not isinstance(mine[name], _PLAIN):
                mine[name] = tree_map(follow, mine[name])
        if m != slice(None):
            settings = {name: value.values[m] for name, value in mine.items() if isinstance(value, PerModel)}
            mine |= settings if isinstance(m, int) else {name: PerModel(values) for name, values in settings.items()}
        for hooks in HOOKS:
            if mine[hooks] and any(
                _is_method(hook) or isinstance(hook, PerModelValue) for hook in mine[hooks].values()
            ):
                mine[hooks] = tree_map(follow, mine[hooks])
    return twins[id(root)]


def _is_method(value: Any) -> bool:
    return isinstance(value, types.MethodType)


def is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) or type(value) in _PLAIN


def flattened(twin: nn.Module) -> dict[tuple[str, str, str], Any]:
    """Return a replica's state: tensors and numbers as they are, else leaves, structure, and what objects hold."""
    flat: dict[tuple[str, str, str], Any] = {}
    for key, value in read_state(twin).items():
        if not is_leaf(value):
            leaves, spec = tree_flatten(value)
            value = (leaves, spec, held_inside(leaves))
        flat[key] = value
    return flat


def held_inside(leaves: list) -> list:
    objects = (leaf for leaf in leaves if hasattr(leaf, "__dict__") and not isinstance(leaf, _FOLLOWED))
    return [leaf for found in objects for leaf in tree_flatten(vars(found))[0]]


def outcome(twin: nn.Module, given: dict, before: State, edited: set[int], output: Any, m: int | None = None) -> State:
    """Return the state after a replica's call with its output; what the call left alone is the template's own.

    Args:
        twin: the copy, after its call.
        given: its state before, `flattened`.
        before: the state of the module that it copies.
        edited: the ids of copies of constants that were edited in place, and so are constants no more.
        output: what it returned.
        m: the model's number; None under vmap, where all models make the same of an object of the user's, if it is
            no tensor.

    Raises:
        BatchingError: the call kept something in an object that the models share.
    """
    after = read_state(twin)
    for key, value in after.items():
        was = given.get(key, _NEW)
        if value is was and is_leaf(value):
            if id(value) not in edited:
                after[key] = before[key]
            continue
        leaves, spec = tree_flatten(value)
        leaves_given, spec_given, inside = was if type(was) is tuple else ((was,), None, [])
        now = held_inside(leaves)
        changed = [v for v in now if not any(v is w for w in inside)]
        if len(now) != len(inside) or (changed if m is not None else any(isinstance(v, Tensor) for v in changed)):
            raise BatchingError(
                f"'{'.'.join(part for part in (key[0], key[2]) if part)}' holds an object that all models share, and a "
                "call keeps a value in it: keep it in a buffer, an attribute, a list or a dict of the module instead"
            )
        if spec == spec_given and all(
            a is b and id(a) not in edited for a, b in zip(leaves, leaves_given, strict=True)
        ):
            after[key] = before[key]
    return {**after, OUTPUT: output}


def merge(
    records: Sequence[State], before: State, known: Sequence[dict[int, Tensor]], whole: bool
) -> tuple[State, list[tuple]]:
    """Return one state for M models, and the new tensors in it, M of each.

    Args:
        records: the `outcome` of each model; a single one stands for all models under vmap.
        before: the state before the calls.
        known: for each, from the id of a tensor that it was given to the tensor in the template.
        whole: whether the module is the whole model, so that nobody else reads its attributes and each model may
            keep a value of its own there.

    Returns:
        The state, with `Placeholder(i)` where the i-th new tensor belongs, and the list of new tensors.

    Raises:
        BatchingError: values that differ where only one can stand.
    """
    merged: State = {}
    fresh: list[tuple[Tensor, ...]] = []

    def settle(key: tuple[str, str, str], column: tuple) -> Any:
        first = column[0]
        if all(isinstance(leaf, Tensor) for leaf in column):
            origins = [ids.get(id(leaf)) for ids, leaf in zip(known, column, strict=True)]
            if key != OUTPUT and origins[0] is not None and all(origin is origins[0] for origin in origins):
                return origins[0]
            if len({(t.shape, t.dtype) for t in column}) == 1:
                fresh.append(column)
                return Placeholder(len(fresh) - 1)
        elif all(leaf is first or (isinstance(leaf, _PLAIN) and leaf == first) for leaf in column):
            return first
        if whole and key[1] == "__dict__":
            return PerModelValue([v.values[m] if isinstance(v, PerModelValue) else v for m, v in enumerate(column)])
        told = [f"a tensor {list(v.shape)}" if isinstance(v, Tensor) else repr(v) for v in column]
        other = next((m for m, text in enumerate(told) if text != told[0]), len(told) - 1)
        name = ".".join(part for part in (key[0], key[2]) if part)
        raise BatchingError(f"{name} is {told[0]} for model 0 and {told[other]} for model {other}, but has to be alike")

    for key in dict.fromkeys(key for record in records for key in record):
        values = [record.get(key) for record in records]
        if key in before and all(value is before[key] for value in values):
            merged[key] = before[key]
            continue
        flat = [tree_flatten(value) for value in values]
        if all(spec == flat[0][1] for _, spec in flat):
            columns = zip(*(leaves for leaves, _ in flat), strict=True)
            merged[key] = tree_unflatten([settle(key, column) for column in columns], flat[0][1])
        else:
            merged[key] = settle(key, tuple(values))
    return merged, fresh


def materialize(merged: State, tensors: Sequence[Tensor]) -> tuple[Any, State, list[Tensor]]:
    """Put the stacked new tensors where they belong.

    Returns:
        The output, the state, and the tensors that now stand in plain attributes.
    """
    filled, plain = {}, []
    for key, value in merged.items():
        if isinstance(value, Tensor):
            filled[key] = value
            continue
        places = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Placeholder)]
        if places:
            value = tree_map(lambda leaf: tensors[leaf] if isinstance(leaf, Placeholder) else leaf, value)
        if key[1] == "__dict__":
            plain += [tensors[place] for place in places]
        filled[key] = value
    return filled.pop(OUTPUT), filled, plain
