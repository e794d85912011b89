"""Putting together what chunks of models have made: outputs, gradients, and what their calls have assigned anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..batch.context import CallContext
from ..batch.select import has_gradient
from ..common.checks import cut
from ..common.objects import flatten, unflatten
from ..vmap import BatchingError, PerModel, PerModelValue, note_models_with_gradient, write_state


def join_outputs(parts: list[tuple[Any, int]]) -> Any:
    """Return nested tensors `[M, ...]` from those of each chunk, given with the number of its models."""
    if len(parts) == 1:
        return parts[0][0]
    flat, sizes = [flatten(part) for part, _ in parts], [size for _, size in parts]
    if any(spec != flat[0][1] for _, spec in flat):
        raise BatchingError("the outputs have another structure in one chunk of models than in the next")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return unflatten([_joined(column, sizes, "the output", PerModel) for column in columns], flat[0][1])


def _joined(column: tuple, sizes: list[int], what: str, numbers: type = PerModelValue) -> Any:
    """Return what stands for the values of several chunks; of numbers that differ, a `numbers` of them."""
    if all(isinstance(leaf, Tensor) for leaf in column):
        return torch.cat(column)
    if all(leaf is column[0] for leaf in column):
        return column[0]
    if any(isinstance(leaf, Tensor) for leaf in column) and not any(isinstance(v, PerModelValue) for v in column):
        raise BatchingError(f"{what} is a tensor in one chunk of models and another value in the next")
    values: list[Any] = []
    for value, size in zip(column, sizes, strict=True):
        is_own = type(value) in (PerModel, PerModelValue)
        values += value.values if is_own else value if isinstance(value, Tensor) else [value] * size
    if all(v is values[0] or (not isinstance(v, Tensor) and v == values[0]) for v in values):
        return values[0]
    return (numbers if all(isinstance(value, (int, float)) for value in values) else PerModelValue)(values)


class Gradients:
    """Moves the gradients of parts of the models into the whole batch's.

    Args:
        parameters: the batch's, without gradients. num_models: M.
    """

    def __init__(self, parameters: list[nn.Parameter], num_models: int) -> None:
        self._parameters, self._num_models = parameters, num_models
        self._found: dict[nn.Parameter, list[list[bool]]] = {}  # which models have a gradient, part by part

    def expect(self, parameters: Iterable[Tensor]) -> None:
        """Have the parameters of a part, which are rows of the batch's, require gradients where the batch's do."""
        for whole, own in zip(self._parameters, parameters, strict=True):
            own.requires_grad_(whole.requires_grad)

    def take(self, parameters: Iterable[Tensor], models: slice) -> None:
        """Move the gradients of the parameters of a part of the models, which follows the one before."""
        size = models.stop - models.start
        for whole, own in zip(self._parameters, parameters, strict=True):
            if own.grad is None and whole not in self._found:
                continue
            if size == self._num_models:
                whole.grad = own.grad.reshape(whole.shape)
            else:
                if whole not in self._found:
                    whole.grad = torch.empty_like(whole)
                    whole.grad[: models.start] = 0
                whole.grad[models] = 0 if own.grad is None else own.grad
            self._found.setdefault(whole, [[False] * models.start]).append(has_gradient(own, size))
            own.grad = None

    def drop(self) -> None:
        """Clear what has been moved so far, of a pass that was cut short."""
        for parameter in self._found:
            parameter.grad = None

    def note(self) -> None:
        """Note which models have a gradient, after the last part."""
        for parameter, flags in self._found.items():
            note_models_with_gradient(parameter.grad, [flag for part in flags for flag in part])


def keep_state(context: CallContext, before: dict, after: list[dict], sizes: list[int], changed: set[tuple]) -> None:
    """Put together what the calls of chunks of `sizes` models assigned anew, and keep it in the batch.

    Args:
        before, after: the batch's state before the calls, and each chunk's after its own.
        changed: what one of the calls has assigned.
    """
    fresh: dict[int, Tensor] = {}

    def join(key: tuple, name: str, column: tuple) -> Any:
        whole = _joined(column, sizes, f"'{name}'")
        if isinstance(whole, Tensor):
            fresh[id(whole)] = whole
        elif isinstance(whole, PerModelValue) and key[1] != "__dict__":
            first = cut(repr(column[0]))
            raise BatchingError(f"'{name}' is {first} in one chunk of models and another value in the next")
        return whole

    state = dict(before)
    for key in changed:
        name = ".".join(part for part in (key[0], key[2]) if part)
        flat = [tree_flatten(part.get(key)) for part in after]
        if any(spec != flat[0][1] for _, spec in flat):
            raise BatchingError(f"'{name}' has another structure in one chunk of models than in the next")
        leaves = [join(key, name, column) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
        state[key] = tree_unflatten(leaves, flat[0][1])
    if changed:
        write_state(before, state)
        plain = {id(t) for key in changed if key[1] == "__dict__" for t in tree_flatten(state[key])[0]}
        held = {id(t) for value in state.values() for t in tree_flatten(value)[0]}
        kept = [t for t in context.attributes if id(t) in held]
        context.attributes = kept + [t for i, t in fresh.items() if i in plain]
