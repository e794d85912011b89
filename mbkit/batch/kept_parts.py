"""What several models, or chunks of them, have kept in one place outside of them, put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..vmap import BatchingError, PerModel, stack_alike
from .places import MARK


def marked(stack: Tensor) -> Tensor:
    setattr(stack, MARK, True)
    return stack


def together(columns: tuple, parts: list[int | slice], sources: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Put together what several parts of the models have left at a place; `sources` has what they had of a tensor."""
    first = columns[0]
    if isinstance(first, dict) and all(c.keys() == first.keys() for c in columns):
        return {name: _joined([c[name] for c in columns], parts, sources) for name in first}
    if isinstance(first, list) and all(len(c) == len(first) for c in columns):
        return [_joined(list(values), parts, sources) for values in zip(*columns, strict=True)]
    if all(c == first for c in columns):
        return first
    raise BatchingError("a function keeps more values for one model than for another, in one dict, list or set for all")


def _joined(values: list[Any], parts: list[int | slice], sources: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Return what stands for the value of each part."""
    first = values[0]
    if all(value is first for value in values):
        return first
    if all(isinstance(value, Tensor) for value in values):
        return _joined_tensors(values, parts, sources)
    if all(isinstance(value, (int, float)) for value in values):
        numbers = []
        for value, part in zip(values, parts, strict=True):
            numbers += value.values if isinstance(value, PerModel) else [value] * _size(part)
        return first if all(type(v) is type(first) and v == first for v in numbers) else PerModel(numbers)
    flat = [tree_flatten(value) for value in values]
    if all(spec == flat[0][1] and not spec.is_leaf() for _, spec in flat):
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        return tree_unflatten([_joined(list(column), parts, sources) for column in columns], flat[0][1])
    facts = [(type(value), getattr(value, "__dict__", value)) for value in values]
    if all(fact == facts[0] for fact in facts):
        return first
    raise BatchingError(f"a function keeps {first!r} for one model, {values[-1]!r} for another, in one place for all")


def _joined_tensors(values: list[Tensor], parts: list[int | slice], sources: dict) -> Tensor:
    known, rows = {id(leaf) for _, leaf in sources.values()}, []
    each = [hasattr(value, MARK) for value in values]
    if not any(each) and all(torch.equal(value, values[0]) for value in values):
        if id(values[0]) not in sources:
            return values[0]
        source = sources[id(values[0])][1]
        source.data.copy_(values[0])  # a counter, the same for all
        return source
    for value, part, stacked in zip(values, parts, each, strict=True):
        share = value[part] if stacked and id(value) in known else value
        rows.append(share if stacked and isinstance(part, slice) else share.expand(_size(part), *share.shape))
    shapes = [list(row.shape[1:]) for row in rows]
    if any(shape != shapes[0] for shape in shapes):
        raise BatchingError(f"a function keeps tensors of several shapes, {shapes}, in one place for all models")
    return marked(stack_alike([row[0] for row in rows]) if isinstance(parts[0], int) else torch.cat(rows))


def _size(part: int | slice) -> int:
    return 1 if isinstance(part, int) else part.stop - part.start
