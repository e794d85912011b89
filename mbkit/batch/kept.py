"""What functions of the user's keep between their calls: counters, recorders, caches, the state of a criterion.

Alone, each model has a loss function to itself. M models share one, so what it keeps has to become each model's own: a
tensor becomes one of `[M, ...]`, and numbers that differ become a `PerModel`. What is the same for all models, such as
a counter, is kept once, and counts once for all of them, whether they are called at once or one after the other.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ..common.functions import at_hand
from ..vmap import BatchingError, PerModel, as_one_model_sees, as_stacked, graph_nodes, show_gradient, tensors_in
from .context import CallContext
from .kept_parts import marked, together
from .places import MARK, Place, Snapshot, read
from .python_values import PythonValues

_CODE = (type, FunctionType)
_FIXED = (type, ModuleType, FunctionType, property, staticmethod, classmethod)
_MOST = 2_000  # objects that are looked at, and at what they hold in every call: what is kept stands near the layers


def kept_by(context: CallContext, loss_fn: Callable | None = None, method: str = "") -> Kept:
    """Return what the models' forward, the methods called so far and a loss function, or the one before, may keep."""
    known, name = context.kept, method.rpartition(".")[2]
    if known is None or name not in known.methods or (loss_fn is not None and not known.is_for(loss_fn)):
        latest, methods = (known.loss_fn, known.methods) if known else (None, {""})
        code = {c for m in context.template.modules() for c in (type(m), *vars(m).values()) if isinstance(c, _CODE)}
        known = context.kept = Kept(code, latest if loss_fn is None else loss_fn, methods | {name})
    return known


class Kept:
    """The places where functions may keep values: globals, closures, attributes, lists, dicts and sets.

    Args:
        code: the modules' classes, of which torch's own keep nothing, and functions in their attributes.
        loss_fn: the loss function, if there is one yet.
        methods: names of the methods beside forward that are called.
    """

    def __init__(self, code: Iterable[Callable], loss_fn: Callable | None, methods: Iterable[str]) -> None:
        self._code, self._loss = sorted(code, key=lambda part: part.__name__), (loss_fn, *at_hand(loss_fn))
        self.loss_fn, self.methods = loss_fn, methods
        self._steady: dict[int, weakref.ref] = {}  # the tensors that calls do not edit
        self._inside = 0  # how many calls of `in_parts` go on
        self._renew()

    def is_for(self, loss_fn: Callable) -> bool:
        """Say whether a loss function is the same: one object, or one code with the same objects at hand."""
        (mine, *held), others = self._loss, at_hand(loss_fn)
        alike = mine is loss_fn or getattr(mine, "__code__", 0) is getattr(loss_fn, "__code__", 1)
        return alike and len(others) == len(held) and all(map(operator.is_, others, held))

    def _renew(self) -> None:
        code = [(part.__name__, part) for part in self._code]
        self._values = PythonValues([*code, ("loss_fn", self.loss_fn)], names=self.methods, most=_MOST)
        self._places = list(filter(_may_change, self._values.places))
        self._caches = [cached for _, cached in self._values.caches]
        self._latest: Snapshot | None = None  # which has held since a call began

    def _look(self) -> Snapshot:
        if self._latest is None or not self._latest.holds:
            self._latest = Snapshot(self._places)
        return self._latest

    def has_rows(self) -> bool:
        """Say whether something is kept for each model."""
        return self._look().has_rows

    def has(self, keeper: Any) -> bool:
        """Say whether a list, dict or set, or an attribute of an object, is one of the places."""
        attributes = getattr(keeper, "__dict__", keeper)
        return any(place.owner is keeper or place.owner is attributes for place in self._places)

    def refuse_trained(self, losses: Tensor, outputs: Any) -> None:
        """Refuse a loss whose gradient reaches a parameter that is kept: all models would add theirs up in it.

        A tensor that the outputs depend on as well is an input, which the loss may differentiate by.

        Raises:
            ValueError: there is one.
        """
        tensors = [(name, t) for name, t in self._values.tensors if isinstance(t, Tensor)]
        names = {id(t): name.rpartition(".")[2] for name, t in tensors if t.requires_grad and t.is_leaf}
        reached = (_leaves(losses) & names.keys()) if names else set()
        for leaf in reached - _leaves(outputs) if reached else ():
            told = f"Expected a loss function without parameters of its own, got one that trains '{names[leaf]}'"
            raise ValueError(f"{told}, which all models would share: make it a part of each, which forward returns.")

    def under_vmap(self) -> AbstractContextManager:
        """Call functions under vmap: each model sees its own share of what is kept, and what they keep is unwrapped.

        After an error everything that is kept is what it was before.
        """
        return self._under_vmap() if self._places or self._caches else nullcontext()

    @contextmanager
    def _under_vmap(self) -> Iterator[None]:
        before = self._look()
        misses = [cache.cache_info().misses for cache in self._caches]
        known: dict[int, tuple[Tensor, Tensor]] = {}  # what a model sees of a tensor, and the tensor

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not hasattr(leaf, MARK):  # others might answer to any name
                return leaf
            seen = as_one_model_sees(leaf)
            known[id(seen)] = (seen, leaf)
            return seen

        def unwrap(leaf: Any, once: bool) -> Any:
            if id(leaf) in known:
                return known[id(leaf)][1]
            whole = as_stacked(leaf) if isinstance(leaf, Tensor) else None
            if whole is None:
                return leaf
            show_gradient(whole)
            if once and not whole.requires_grad and all(torch.equal(row, whole[0]) for row in whole):
                return whole[0].clone()
            return marked(whole)

        if before.has_rows:
            before.put([mapped(contents, wrap) for contents in before.contents])
        try:
            yield
        except BaseException:
            before.put(before.contents)
            raise
        finally:
            for cache, count in zip(self._caches, misses, strict=True):
                if cache.cache_info().misses != count:
                    cache.cache_clear()  # it has got tensors of this call, of no use after it
        if not before.has_rows and before.holds:
            return
        # A dict may be a cache of tables that others use as well, so what is the same for all models stays as alone.
        after = [
            mapped(contents, partial(unwrap, once=isinstance(place.owner, dict)))
            for place, contents in zip(self._places, map(read, self._places), strict=True)
        ]
        before.put(after)
        self._renew_if(not before.holds)

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Call one layer for each model, where all models at once have one share of what is kept.

        Raises:
            BatchingError: the calls, or hooks, have kept something there: M times, and not each model for itself.
        """
        before = self._look()
        yield
        if not before.holds:
            raise BatchingError("what it keeps outside of the model is read by forward or the loss as well")

    @contextmanager
    def in_parts(self, num_models: int) -> Iterator[Callable]:
        """Call functions for some models after the others, all from where the first began; put together what they keep.

        Yields a function that makes the `with` block for one model's number, or for a slice of the models.
        """
        if not self._places:
            yield lambda models: nullcontext()
            return
        start, self._inside = self._look(), self._inside + 1
        parts: list[int | slice] = []
        ends: list[list[Any]] = []
        sources: dict[int, tuple[Tensor, Tensor]] = {}  # what a part had of a tensor, and the tensor

        @contextmanager
        def part(models: int | slice) -> Iterator[None]:
            memo: dict[int, tuple[Tensor, Tensor]] = {}  # a tensor's copy for this part, and its share

            def give(leaf: Any) -> Any:
                if isinstance(leaf, PerModel):
                    return leaf.values[models] if isinstance(models, int) else PerModel(leaf.values[models])
                if not isinstance(leaf, Tensor) or self._is_steady(leaf):
                    return leaf
                if id(leaf) not in memo:
                    share = leaf[models] if hasattr(leaf, MARK) else leaf
                    mine = share.clone()
                    if hasattr(leaf, MARK) and isinstance(models, slice):
                        marked(mine)
                    memo[id(leaf)], sources[id(mine)] = (mine, share), (mine, leaf)
                return memo[id(leaf)][0]

            def take(leaf: Any) -> Any:
                source = sources[id(leaf)][1] if id(leaf) in sources else leaf
                return source if source is not leaf and torch.equal(*memo[id(source)]) else leaf

            all_share = not any(isinstance(leaf, PerModel) or not self._is_steady(leaf) for leaf in start.leaves)
            start.put(start.contents if all_share else [mapped(contents, give) for contents in start.contents])
            yield
            parts.append(models)
            unchanged = all_share and start.holds
            ends.append(start.contents if unchanged else [mapped(c, take) for c in map(read, self._places)])

        try:
            yield part
        finally:
            start.put(start.contents)
            self._inside -= 1
        if parts and not all(end is start.contents for end in ends):
            whole = [together(columns, parts, sources) for columns in zip(*ends, strict=True)]
            edited = {id(sources[id(leaf)][1]) for leaf in tensors_in(ends) if id(leaf) in sources}
            for leaf in tensors_in(start.contents):
                if id(leaf) not in edited and not hasattr(leaf, MARK):
                    self._steady[id(leaf)] = weakref.ref(leaf)
            start.put(whole)
            self._renew_if(not start.holds)

    def _renew_if(self, changed: bool) -> None:
        """Look for places again once a call has kept something new, unless its end is to be joined with others'."""
        if changed and not self._inside:
            self._renew()

    def _is_steady(self, tensor: Tensor) -> bool:
        known = self._steady.get(id(tensor))
        return tensor.requires_grad or (known is not None and known() is tensor)


def _leaves(tree: Any) -> set[int]:
    return {id(getattr(node, "variable", None)) for node in graph_nodes(tree)}


def _may_change(place: Place) -> bool:
    """Say whether a call may put something else there: hardly where a class, a module or a function has its name."""
    return place.key is None or not any(isinstance(value, _FIXED) for value in read(place))


def mapped(contents: Any, function: Callable[[Any], Any]) -> Any:
    """Return contents with a function applied to the tensors and numbers in them; a list inside is a place itself."""

    def inside(value: Any) -> Any:
        if not isinstance(value, tuple):
            return function(value)
        made = [inside(part) for part in value]
        changed = type(value)(*made) if hasattr(value, "_fields") else tuple(made)
        return value if all(map(operator.is_, made, value)) else changed

    if isinstance(contents, dict):
        return {name: inside(value) for name, value in contents.items()}
    return contents if isinstance(contents, set) else [inside(value) for value in contents]
