"""A copy of a module for one model, and what a call has changed in it: the way from M models to one and back.

A copy shares everything with the module but its tensors, its children and its plain attributes, so a call can assign
what it likes without touching the module. Whatever it did assign (a buffer, a tensor or number in a plain attribute,
an entry of a list) is read off afterwards and kept for each model.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..common.checks import cut
from ..common.objects import Opened, PerModelValue, flatten, tensors_of, unflatten
from .differing import Differing, Guarded, can_be_opened
from .errors import PATH, BatchingError, ClosedOutput
from .per_model import PerModel
from .shared_objects import SharedObjects, is_object
from .state import HOOKS, OUTPUT, PLAIN, Absent, Key, OnStack, State, dotted, is_leaf

_PER_MODEL = (PerModel, PerModelValue)
_UNLIKE = {*_PER_MODEL, OnStack}  # types of attributes that a copy does not share with its module
_FOLLOWED = {types.MethodType, PerModelValue}  # types of hooks that each copy has of its own
_ALL, _NEW = slice(None), object()


class Placeholder(int):
    """Stands for the i-th new tensor of a call until the M of it are stacked."""


class Unfinished(NamedTuple):
    """A value with placeholders among its leaves."""

    leaves: list[Any]
    spec: Any


def copy_module(root: nn.Module, own: dict[int, Tensor], m: int | slice = _ALL, *, alone: bool = False) -> nn.Module:
    """Return a copy of a module; the arguments are those of `ModuleCopy`."""
    return ModuleCopy(State(root), own, m, alone).module


class ModuleCopy:
    """A copy of a module that holds one model's tensors, and `m`'s own values where the models differ.

    Args:
        before: the module's state.
        own: from the id of a tensor in it to the one that takes its place.
        m: the model's number, or those of several for what stands for all of them.
        alone: the copy is to live on its own, so it gets no note of where it came from.

    Attributes:
        module: the copy; None of a state without modules.
        assigned: after one model's call, what it has assigned in shared objects; see `SharedObjects`.
    """

    def __init__(self, before: State, own: dict[int, Tensor], m: int | slice = _ALL, alone: bool = False) -> None:
        self._before, self._own, self._m = before, own, m
        self._picked: list[Any] = []  # values that are the model's own
        self._given: dict[Key, Any] = {}  # before the call: leaves as they are, else leaves and structure
        self._shared, self.assigned = SharedObjects(), {}
        self._origins: dict[int, Tensor] = {}  # from the id of a tensor in the copy to the one in the module
        copies = {id(module): object.__new__(type(module)) for module in before.modules.values()}
        self._copies, for_all = copies, m == _ALL
        for path, module in before.modules.items():
            mine, settings, hidden = vars(copies[id(module)]), {}, {}
            mine.update(vars(module))
            if not alone:
                mine.setdefault(PATH, path)
            for name, value in [(name, value) for name, value in mine.items() if type(value) in _UNLIKE]:
                if type(value) is OnStack:
                    del mine[name]
                    continue
                mine[name] = settings[name] = self._pick(value, name)
                own_value = for_all and type(value) is PerModelValue and not hasattr(type(module), name)
                if own_value and not can_be_opened(value.values):  # no form stands for all models at once
                    hidden[name] = value.values
                if name in hidden or mine[name] is Absent:
                    del mine[name]
            children = module._modules.items()
            mine["_modules"] = {name: copies.get(id(child), child) for name, child in children} if children else {}
            for store in ("_parameters", "_buffers"):
                held, mine[store] = mine[store], {}
                for name, tensor in held.items():
                    mine[store][name] = tensor if tensor is None else self._tensor(tensor)
                    self._given[path, store, name] = mine[store][name]
            if hidden:
                mine["_parameters"] = Guarded(mine["_parameters"], hidden)
            for name in filter(mine.__contains__, before.own[path]):
                if name not in settings and not isinstance(mine[name], PLAIN):
                    mine[name] = tree_map(self._follow, mine[name])
                self._given[path, "__dict__", name] = mine[name]
                if not is_leaf(mine[name]):
                    leaves, spec = tree_flatten(mine[name])
                    self._given[path, "__dict__", name] = leaves, spec
                    own = set(map(id, self._picked))
                    self._shared.note(dotted((path, "", name)), [leaf for leaf in leaves if id(leaf) not in own])
            for hooks in HOOKS:
                if mine[hooks] and not _FOLLOWED.isdisjoint(map(type, mine[hooks].values())):
                    mine[hooks] = tree_map(self._follow, mine[hooks])
                elif not for_all:  # a call may register hooks, and the next model's has to do so as well
                    mine[hooks] = mine[hooks].copy()
        root = before.modules.get("")
        self.module = None if root is None else copies[id(root)]

    def _follow(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._tensor(leaf)
        if isinstance(leaf, _PER_MODEL):
            return self._pick(leaf)
        if isinstance(leaf, types.MethodType) and id(leaf.__self__) in self._copies:
            return types.MethodType(leaf.__func__, self._copies[id(leaf.__self__)])
        return self._copies.get(id(leaf), leaf)

    def _pick(self, value: PerModel | PerModelValue, name: str = "an attribute") -> Any:
        """Return a model's own value; under vmap, what stands for those of all of them."""
        if isinstance(self._m, int):
            self._picked.append(value.values[self._m])
            return self._picked[-1]
        if self._m == _ALL and isinstance(value, PerModelValue):
            return Differing(value.values, name)
        return type(value)(value.values[self._m])

    def _tensor(self, tensor: Tensor) -> Tensor:
        mine = self._own.get(id(tensor), tensor)
        self._origins[id(mine)] = tensor
        return mine

    def changes(self, output: Any, edited: Collection[int] = ()) -> dict[Key, Any]:
        """Return what the copy's call has changed, and its output; `Absent` is what it has deleted.

        Args:
            output: what the call returned.
            edited: the ids of copies of constants that were edited in place, and so are constants no more.

        Raises:
            BatchingError: the call kept something in an object that the models share; see `SharedObjects`.
        """
        if isinstance(self._m, int):
            self.assigned = self._shared.take_back()
        else:
            self._shared.refuse_tensors()
        origins = {i: t for i, t in self._origins.items() if i not in edited} if edited else self._origins
        after = State(self.module)
        gone = self._given.keys() - after.keys()
        changes: dict[Key, Any] = dict.fromkeys(gone, Absent)
        for key, value in after.items():
            given = self._given.get(key, _NEW)
            if value is given and is_leaf(value):
                if id(value) in edited:
                    changes[key] = value
                continue
            leaves, spec = tree_flatten(value)
            leaves_given, spec_given = given if type(given) is tuple else ((given,), None)
            made = [vars(leaf) for leaf in leaves if is_object(leaf) and leaf not in self._shared]
            if isinstance(self._m, slice) and any(isinstance(v, Tensor) for v in tree_leaves(made)):
                raise ClosedOutput(f"it keeps tensors in an object, in '{dotted(key)}', one for all models")
            pairs = zip(leaves, leaves_given, strict=True) if spec == spec_given else ()
            if spec != spec_given or not all(a is b and id(a) not in edited for a, b in pairs):
                changes[key] = tree_unflatten([origins.get(id(leaf), leaf) for leaf in leaves], spec)
        for path, module in after.modules.items():  # a method may put layers into another mode
            if path in self._before.modules and module.training != self._before.modules[path].training:
                changes[path, "__dict__", "training"] = module.training
        if isinstance(output, nn.Module):  # of a method that returns the model or a part of it
            output = self._before.modules.get(vars(output).get(PATH), output)
        changes[OUTPUT] = output
        return changes


def merge(each: Sequence[dict[Key, Any]], before: State, whole: bool = False) -> tuple[dict[Key, Any], list[tuple]]:
    """Return for M models what their calls have changed, and the new tensors in it, M of each.

    Args:
        each: of each model's call, from `ModuleCopy.changes`; a single one stands for all models under vmap.
        before: the state before the calls.
        whole: whether the module is the whole model, so that nobody else reads its attributes and each model may
            keep a value of its own there.

    Returns:
        The changes, `Unfinished` where new tensors belong, and the list of new tensors.

    Raises:
        BatchingError: values that differ where only one can stand.
        ClosedOutput: an object in the output that cannot be taken apart, where one would stand for all models.
    """
    known = set(map(id, before.tensors))
    fresh: list[tuple[Tensor, ...]] = []

    def settle(key: Key, column: tuple) -> Any:
        first = column[0]
        if all(isinstance(leaf, Tensor) for leaf in column):
            if key != OUTPUT and id(first) in known and all(leaf is first for leaf in column):
                return first
            if len(column) == 1 or len({(t.shape, t.dtype) for t in column}) == 1:
                fresh.append(column)
                return Placeholder(len(fresh) - 1)
        elif all(leaf is first or (isinstance(leaf, PLAIN) and leaf == first) for leaf in column):
            return first
        if whole and key[1] == "__dict__" and key[2] != "training":
            return PerModelValue([v.values[m] if isinstance(v, PerModelValue) else v for m, v in enumerate(column)])
        if whole and key == OUTPUT and not any(tensors_of(leaf) for leaf in column):
            return (PerModel if all(isinstance(leaf, (int, float)) for leaf in column) else PerModelValue)(column)
        told = [f"a tensor {list(v.shape)}" if isinstance(v, Tensor) else cut(repr(v)) for v in column]
        other = next((m for m, text in enumerate(told) if text != told[0]), len(told) - 1)
        raise BatchingError(
            f"{dotted(key)} is {told[0]} for model 0 and {told[other]} for model {other}, but has to be alike"
        )

    merged: dict[Key, Any] = {}
    for key in dict.fromkeys(key for own in each for key in own):
        values = [own.get(key, before.get(key)) for own in each]
        is_module = isinstance(values[0], nn.Module) and key == OUTPUT
        if (key in before or is_module) and all(value is before.get(key, values[0]) for value in values):
            merged[key] = values[0]
            continue
        if all(isinstance(value, Tensor) for value in values):
            merged[key] = settle(key, tuple(values))
            continue
        flat = [(flatten if key == OUTPUT else tree_flatten)(value) for value in values]
        spec = flat[0][1]
        if key == OUTPUT and len(each) == 1 and not whole and type(spec) is Opened and spec.closed:
            raise ClosedOutput(f"it returns a {spec.closed}, which cannot be one object for all models")
        if all(other == spec for _, other in flat):
            columns = zip(*(leaves for leaves, _ in flat), strict=True)
            merged[key] = Unfinished([settle(key, column) for column in columns], spec)
        else:
            merged[key] = settle(key, tuple(values))
    return merged, fresh


def materialize(merged: Mapping[Key, Any], tensors: Sequence[Tensor]) -> tuple[Any, dict[Key, Any], list[Tensor]]:
    """Put the stacked new tensors where they belong.

    Returns:
        The output, the other changes, and the tensors that now stand in plain attributes.
    """
    filled, plain = {}, []
    for key, value in merged.items():
        leaves = value.leaves if type(value) is Unfinished else [value]
        new = [tensors[leaf] if type(leaf) is Placeholder else leaf for leaf in leaves]
        filled[key] = unflatten(new, value.spec) if type(value) is Unfinished else new[0]
        if key[1] == "__dict__":
            plain += [tensors[leaf] for leaf in leaves if type(leaf) is Placeholder]
    return filled.pop(OUTPUT), filled, plain
