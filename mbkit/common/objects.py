"""Tensors inside objects: taken out, and the objects rebuilt around others, such as those of M models stacked.

torch's tree functions know tuples, lists, dicts and registered classes. Whatever else holds tensors (a cache, a
distribution, a graph, a class of the user's own) is taken apart here as pickle and copy take it apart: by `__dict__`,
`__slots__` or its own `__reduce__`. So one tensor at two places, one object at two places, and circles stay what they
are, and what is rebuilt is always a copy.
"""

from __future__ import annotations

import io
import pickle
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution
from torch.distributions.transforms import Transform
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten, tree_unflatten


class PerModelValue:
    """M values that cannot be stacked, such as numbers that the models computed themselves: `values`, a list."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)

    @classmethod
    def where(cls, flags: Sequence[bool], yes: Any, no: Any) -> PerModelValue:
        """Return M values: from `yes` where the flag is set, else from `no`; either may be one value for all."""
        columns = [v.values if isinstance(v, PerModelValue) else [v] * len(flags) for v in (yes, no)]
        return cls([a if flag else b for flag, a, b in zip(flags, *columns, strict=True)])

    def __repr__(self) -> str:
        return f"PerModelValue({self.values})"


_NUMBERS_AND_TEXTS = (int, float, complex, str, bytes, type(None), Enum, torch.Size, torch.dtype, torch.device)
_SIMPLE = (Tensor, *_NUMBERS_AND_TEXTS, PerModelValue)
_CONSTANT = (type, ModuleType, CodeType, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Opened:
    """How to rebuild what `flatten` has taken apart; equal for two values that are alike but for their leaves.

    Attributes:
        structure: a pickle that names leaves and constants by their numbers.
        constants: classes, functions and modules in it.
        closed: the class of what cannot be taken apart, such as a file or a generator; "" if there is none.
    """

    structure: bytes
    constants: tuple[Any, ...]
    closed: str


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a nested value, and what `unflatten` rebuilds it from.

    Leaves are tensors, numbers, texts and None, and objects that cannot be taken apart. A tensor that stands at several
    places inside objects is one leaf.

    Example:
        >>> from types import SimpleNamespace
        >>> leaves, spec = flatten(SimpleNamespace(x=torch.zeros(2), name="a"))
        >>> leaves
        ['x', tensor([0., 0.]), 'name', 'a']
        >>> unflatten(["x", torch.ones(1), "name", "b"], spec)
        namespace(x=tensor([1.]), name='b')
    """
    leaves, spec = tree_flatten(tree)
    if all(isinstance(leaf, _SIMPLE) for leaf in leaves):
        return leaves, spec
    file = io.BytesIO()
    opener = _Opener(file)
    opener.dump(tree)
    return opener.leaves, Opened(file.getvalue(), tuple(opener.constants), opener.closed)


def unflatten(leaves: Sequence[Any], spec: Any) -> Any:
    """Return the value that `flatten` has taken apart, rebuilt around other leaves."""
    return _Rebuilder(leaves, spec).load() if type(spec) is Opened else tree_unflatten(leaves, spec)


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a nested value."""
    return [tree] if isinstance(tree, Tensor) else [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return a nested value, rebuilt around what a function makes of each tensor in it."""
    if isinstance(tree, Tensor):
        return function(tree)
    leaves, spec = flatten(tree)
    return unflatten([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


class _Leaf(NamedTuple):
    """Marks what is not taken apart."""

    value: Any


class _Constant(NamedTuple):
    """Marks what is the same for all models."""

    value: Any


class _Opener(pickle.Pickler):
    """Writes down a structure, without its leaves and constants."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self.leaves: list[Any] = []
        self.constants: list[Any] = []
        self.closed = ""
        self._places: dict[int, int] = {}  # of tensors and closed objects, by their ids
        self._ranks: dict[int, int] = {}  # how many dimensions a transform's values have, by the transform's id

    def persistent_id(self, value: Any) -> int | None:
        kind = type(value)
        is_constant = kind is _Constant or isinstance(value, _CONSTANT) or getattr(kind, "one_for_all", False)
        if is_constant or _is_plain_function(value):
            self.constants.append(value.value if kind is _Constant else value)
            return -len(self.constants)
        if kind is _Leaf:
            value = value.value
        elif not isinstance(value, _SIMPLE):
            return None
        place = len(self.leaves)
        if kind is _Leaf or isinstance(value, Tensor):
            place = self._places.setdefault(id(value), place)
        if place == len(self.leaves):
            self.leaves.append(value)
        return place

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        try:
            if kind in SUPPORTED_NODES:
                children, context = SUPPORTED_NODES[kind].flatten_fn(value)
                return SUPPORTED_NODES[kind].unflatten_fn, (list(children), context)
            if kind is FunctionType:
                return _open_function(value)
            if kind is MethodType:
                return MethodType, (value.__func__, value.__self__)
            if isinstance(value, weakref.ref) and value() is not None:
                return weakref.ref, (value(),)
            if hasattr(kind, "tobytes"):  # NumPy's
                return _itself, (_Leaf(value),)
            reduced = value.__reduce_ex__(4) if kind is value.__class__ is not torch.Generator else None
        except Exception:  # pickle and copy cannot take it apart: a lock, a file, a generator
            reduced = None
        if isinstance(reduced, str):  # the name of something that there is once
            return _itself, (_Constant(value),)
        if reduced is None:
            self.closed = self.closed or kind.__name__
            return _itself, (_Leaf(value),)
        if len(reduced) > 2 and type(reduced[2]) is dict:
            return *reduced[:2], self._state(value, dict(reduced[2])), *reduced[3:]
        return reduced

    def _state(self, value: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Return an object's state, with sizes that follow from its tensors."""
        state.pop("_memoize_cache", None)  # linear_operator's, which GPyTorch builds on: sizes of one model
        if isinstance(value, Distribution):
            return self._in_distribution(value, state)
        if isinstance(value, Transform):
            return self._in_transform(value, state)
        batch = state.pop("_batch_shape", None)  # GPyTorch's kernels have one as distributions do
        return state if batch is None else state | {"_batch_shape": _Shape(torch.empty(*batch, 0))}

    def _in_distribution(self, value: Distribution, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a distribution that is right for tensors `[M, ...]` as well.

        Its batch shape stands as that of a tensor without elements, which is stacked like the others. Parameters that
        it keeps with fewer dimensions get the missing ones, lest M be broadcast against another dimension.
        """
        batch = state.pop("_batch_shape")
        event = state["_event_shape"]
        shape = {"_batch_shape": _Shape(torch.empty(*batch, *event, 0), len(event))}
        state = shape | state if batch else state | shape  # the first tensor tells the size of the batch
        for name, held in state.items():
            parameter = name.removeprefix("_unbroadcasted_")
            if isinstance(held, Tensor) and (parameter != name or name == "_capacitance_tril"):
                own = getattr(type(value).arg_constraints.get(parameter), "event_dim", 2)
                state[name] = _to_rank(held, len(batch) + own)
        if isinstance(value, TransformedDistribution):
            base = value.base_dist
            self._note_ranks(value.transforms, len(base.batch_shape) + len(base.event_shape))
        return state

    def _in_transform(self, value: Transform, state: dict[str, Any]) -> dict[str, Any]:
        rank = self._ranks.get(id(value), 0)
        if isinstance(value._inv, Transform):  # of an inverse, which pickle would lose
            state["_inv"] = value._inv
        inner = [*state.get("parts", ()), state.get("base_transform"), state["_inv"]]
        self._note_ranks([transform for transform in inner if transform is not None], rank)
        names = {"loc", "scale", "exponent"} & state.keys()
        return state | {name: _to_rank(state[name], rank) for name in names if isinstance(state[name], Tensor)}

    def _note_ranks(self, transforms: Iterable[Transform], rank: int) -> None:
        for transform in transforms:
            self._ranks[id(transform)] = rank
            rank += transform.codomain.event_dim - transform.domain.event_dim


class _Rebuilder(pickle.Unpickler):
    """Reads a structure, with leaves and constants for their numbers."""

    def __init__(self, leaves: Sequence[Any], spec: Opened) -> None:
        super().__init__(io.BytesIO(spec.structure))
        self._leaves, self._constants = leaves, spec.constants

    def persistent_load(self, number: int) -> Any:
        return self._leaves[number] if number >= 0 else self._constants[-number - 1]


class _Shape(NamedTuple):
    """Stands for a batch shape: that of a tensor, without its last dimension and those of an event before it."""

    like: Tensor
    event_dims: int = 0

    def __reduce__(self) -> tuple:
        return _shape_before, (self.like, _Constant(self.event_dims))


def _shape_before(like: Tensor, event_dims: int) -> torch.Size:
    return like.shape[: like.dim() - 1 - event_dims]


def _to_rank(tensor: Tensor, rank: int) -> Tensor:
    return tensor[(None,) * (rank - tensor.dim())] if tensor.dim() < rank else tensor


def _is_plain_function(value: Any) -> bool:
    """Say whether a value is a function that there is once, and no method of an object."""
    if type(value) is BuiltinFunctionType:
        return value.__self__ is None or isinstance(value.__self__, (type, ModuleType))
    return type(value) is FunctionType and "<locals>" not in value.__qualname__


def _itself(value: Any) -> Any:
    return value


def _open_function(function: FunctionType) -> tuple:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    own = function.__defaults__, function.__kwdefaults__, function.__dict__
    names = function.__code__, _Constant(function.__globals__), function.__name__, len(cells)
    return _empty_function, names, (cells, *own), None, None, _fill_function


def _empty_function(code: CodeType, names: Any, name: str, cells: int) -> FunctionType:
    return FunctionType(code, names, name, None, tuple(CellType() for _ in range(cells)))


def _fill_function(function: FunctionType, state: tuple) -> None:
    contents, function.__defaults__, function.__kwdefaults__, own = state
    function.__dict__.update(own)
    for cell, content in zip(function.__closure__ or (), contents, strict=True):
        cell.cell_contents = content
