"""Training a batch in chunks of models: parts that share its memory, one after the other.

A chunk is a CallContext whose tensors are rows of the whole batch's tensors and whose streams are the batch's own, so
what it trains is trained. Only one chunk's activations exist at a time: they fit into memory, or into the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from ..batch.call import call_models
from ..batch.context import CallContext, context_of
from ..batch.kept import kept_by
from ..batch.loss import call_losses
from ..batch.model_batch import ModelBatch
from ..batch.targets import TargetForms, targets_at
from ..common.checks import check_inputs
from ..common.machine import free_memory
from ..vmap import (
    HOOKS,
    BatchingError,
    PerModelValue,
    copy_module,
    models_with_gradient,
    note_models_with_gradient,
    read_state,
    write_state,
)
from .loop import arguments, call, detach, first_tensor

__all__ = ["Chunks", "backward_at_once", "calls_are_own", "weighed"]

_SHARE = 0.5  # of the free memory that one chunk's activations may take
_ENOUGH = 128 << 20  # bytes of them on a CPU: 64 LeNets in chunks of 16 to 43 take the same time, within its noise


class Chunks:
    """Cuts a batch into chunks of `size` models, and makes the forward and backward passes chunk by chunk.

    Args:
        batch: M models.
        size: how many models make a chunk; the last one may have fewer. None for as many as memory allows, which the
            first call finds out on its first few models.

    Attributes:
        size: the same; known after the first call.
        bytes_each: known after the first call: what a model's forward pass keeps for its backward pass, beside weights
            and inputs; where there is to be none, all that it makes.
    """

    def __init__(self, batch: nn.Module, size: int | None = None) -> None:
        self.batch, self.size = batch, size
        self.bytes_each = 0
        self._rows: dict[int, tuple[Tensor, int, dict]] = {}  # by the id of a tensor of the whole batch
        self._steady: dict[tuple[int, int], dict] = {}  # by chunk; see model_call.Memory

    def __iter__(self) -> Iterator[tuple[int, int, CallContext]]:
        """Yield (first model, the one after the last, chunk)."""
        stop, num_models = 0, self.batch.num_models
        while stop < num_models:
            start, stop = stop, min(stop + (self.size or max(4, -(-num_models // 16))), num_models)
            yield start, stop, self._chunk(start, stop)

    def call(self, x: Any, shared_input: bool) -> Any:
        """Return what the batch returns for these inputs, without gradients."""
        if self.size == self.batch.num_models or not calls_are_own(self.batch):
            return call(partial(self.batch, shared_input=shared_input), x)
        return _join([out for *_, out in self._calls(x, shared_input)])

    def backward(self, x: Any, y: Any, loss_fn: Callable, forms: TargetForms) -> tuple[Tensor, Any]:
        """Add up the gradients of all models; return the losses [M] and the outputs, detached."""
        batch, losses, outputs = self.batch, [], []
        if not calls_are_own(batch):
            return backward_at_once(batch, x, y, loss_fn, forms)
        gradients: dict[nn.Parameter, list[list[bool]]] = {}
        for start, stop, chunk, out in self._calls(x, batch.shared_input, loss_fn):
            targets = y
            some = first_tensor(out)
            if some is not None:  # or else call_losses says what is wrong
                whole = forms.of(y, (batch.num_models, *some.shape[1:]), batch.num_models)
                targets = targets_at(y, whole, slice(start, stop))
            loss = call_losses(chunk, out, targets, loss_fn, forms)
            loss.sum().backward()
            _collect(batch, chunk.template, start, stop, gradients)
            losses.append(loss.detach())
            outputs.append(detach(out))
        for parameter, flags in gradients.items():
            note_models_with_gradient(parameter.grad, [flag for row in flags for flag in row])
        context_of(batch).latest_losses = torch.cat(losses)
        return batch.latest_losses, _join(outputs)

    def _calls(
        self, x: Any, shared_input: bool, loss_fn: Callable | None = None
    ) -> Iterator[tuple[int, int, CallContext, Any]]:
        """Call chunk after chunk; yield (first model, the one after the last, chunk, outputs), and keep its state."""
        whole, after = context_of(self.batch), []
        before = read_state(whole.template)
        if not shared_input:
            check_inputs(tree_leaves(x), whole.num_models)
        with kept_by(whole, loss_fn).in_parts(whole.num_models) as part:
            for start, stop, chunk in self:
                with part(slice(start, stop)):
                    given = read_state(chunk.template)
                    mine = x if shared_input else tree_map_only(Tensor, lambda t, a=start, b=stop: t[a:b], x)
                    args, kwargs = arguments(mine)
                    if self.bytes_each:
                        out = call_models(chunk, args, kwargs, shared_input)
                    else:
                        with weighed((list(chunk.template.parameters()), mine)) as sizes:
                            out = call_models(chunk, args, kwargs, shared_input)
                        self.bytes_each = max(1, sum(sizes) // chunk.num_models)
                        self.size = self.size or self.largest(first_tensor(out).device)
                    yield start, stop, chunk, out
                    now = read_state(chunk.template)
                    after.append({key: value for key, value in now.items() if value is not given.get(key)})
        _keep(whole, before, after)

    def largest(self, device: torch.device) -> int:
        """Return how many models at once memory allows, `bytes_each` being known."""
        room = int(_SHARE * free_memory(device))
        room = min(room, _ENOUGH) if device.type == "cpu" else room
        return min(max(1, room // self.bytes_each), self.batch.num_models)

    def _chunk(self, start: int, stop: int) -> CallContext:
        whole = context_of(self.batch)
        tensors = [*whole.template.parameters(), *whole.template.buffers(), *whole.attributes]
        own = {id(t): self._row(t, start, stop) for t in tensors}
        frozen = None if whole.frozen is None else whole.frozen[start:stop]
        return replace(
            whole,
            template=copy_module(whole.template, own, slice(start, stop), alone=True),
            attributes=[own[id(t)] for t in whole.attributes],
            num_models=stop - start,
            streams=whole.streams.part(start, stop),
            frozen=frozen if frozen is not None and frozen.any() else None,
            steady=self._steady.setdefault((start, stop), {}),
        )

    def _row(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Return the chunk's rows of a tensor: always the same object, for as long as the tensor is the same."""
        if tensor.layout is not torch.strided:  # a constant such as a graph's edges; its rows have no address to share
            return tensor.detach().index_select(0, torch.arange(start, stop, device=tensor.device))
        known, pointer, rows = self._rows.get(id(tensor), (None, 0, {}))
        if known is not tensor or pointer != tensor.data_ptr():
            rows = {}
            self._rows[id(tensor)] = (tensor, tensor.data_ptr(), rows)
        if (start, stop) not in rows:
            row = tensor.detach()[start:stop]
            is_parameter = isinstance(tensor, nn.Parameter)
            rows[start, stop] = nn.Parameter(row, requires_grad=tensor.requires_grad) if is_parameter else row
        return rows[start, stop].requires_grad_(tensor.requires_grad and tensor.is_leaf)


def calls_are_own(batch: nn.Module) -> bool:
    """Say whether a batch's calls are ModelBatch's own and nobody looks on: a part of it may be called instead."""
    verbs = ("forward", "compute_loss")
    own = all(getattr(type(batch), verb) is getattr(ModelBatch, verb) and verb not in vars(batch) for verb in verbs)
    return own and not any(vars(batch)[hooks] for hooks in HOOKS)


def backward_at_once(batch: nn.Module, x: Any, y: Any, loss_fn: Callable, forms: TargetForms) -> tuple[Tensor, Any]:
    """Do what `Chunks.backward` does, for all models at once."""
    outputs = call(batch, x)
    losses = batch.compute_loss(outputs, y, loss_fn, reduction="none", shared_targets=forms)
    losses.sum().backward()
    return losses.detach(), detach(outputs)


@contextmanager
def weighed(given: Any) -> Iterator[list[int]]:
    """Weigh a call on tensors `given`: yield a list that then gets the bytes of each storage that it keeps or makes."""
    known, kept, sizes = _storages(given), {}, []

    def pack(tensor: Tensor) -> Tensor:
        kept.update(_storages(tensor))
        return tensor

    if torch.is_grad_enabled():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield sizes
        sizes += [size for pointer, size in kept.items() if pointer not in known]
    else:
        with _Made(sizes):
            yield sizes


class _Made(TorchDispatchMode):
    """Notes the size of every storage that an operator makes."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self._sizes = sizes

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made, given = function(*args, **(kwargs or {})), _storages((args, kwargs))
        self._sizes += [size for pointer, size in _storages(made).items() if pointer not in given]
        return made


def _storages(tree: Any) -> dict[int, int]:
    """Return the storages of the tensors in a tree: address to bytes; a sparse tensor has none."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _join(outputs: list[Any]) -> Any:
    return tree_map(lambda *parts: torch.cat(parts), *outputs)


def _collect(batch: nn.Module, chunk: nn.Module, start: int, stop: int, found: dict) -> None:
    """Move a chunk's gradients into the whole batch's."""
    for whole, own in zip(batch.parameters(), chunk.parameters(), strict=True):
        if own.grad is None:
            if whole in found:
                whole.grad[start:stop] = 0
                found[whole].append([False] * (stop - start))
            continue
        if whole not in found:
            whole.grad = torch.empty_like(whole)
            whole.grad[:start] = 0
            found[whole] = [[False] * start]
        whole.grad[start:stop] = own.grad
        reached = models_with_gradient(own.grad, stop - start)
        found[whole].append([True] * (stop - start) if reached is None else reached.tolist())
        own.grad = None


def _keep(context: CallContext, before: dict, after: list[dict]) -> None:
    """Put together what the chunks' calls assigned anew, and keep it in the batch."""
    changed = {key for state in after for key in state}
    fresh: dict[int, Tensor] = {}

    def join(name: str, column: tuple) -> Any:
        if all(isinstance(leaf, Tensor) for leaf in column):
            whole = torch.cat(column)
            fresh[id(whole)] = whole
            return whole
        if all(isinstance(leaf, PerModelValue) for leaf in column):
            return PerModelValue([value for leaf in column for value in leaf.values])
        if any(leaf is not column[0] and leaf != column[0] for leaf in column):
            raise BatchingError(f"'{name}' is {column[0]!r} in one chunk of models and another value in the next")
        return column[0]

    state = dict(before)
    for key in changed:
        name = ".".join(part for part in (key[0], key[2]) if part)
        flat = [tree_flatten(part.get(key)) for part in after]
        if any(spec != flat[0][1] for _, spec in flat):
            raise BatchingError(f"'{name}' has another structure in one chunk of models than in the next")
        leaves = [join(name, column) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
        state[key] = tree_unflatten(leaves, flat[0][1])
    if changed:
        write_state(context.template, before, state)
        plain = {id(t) for key in changed if key[1] == "__dict__" for t in tree_flatten(state[key])[0]}
        held = {id(t) for value in state.values() for t in tree_flatten(value)[0]}
        kept = [t for t in context.attributes if id(t) in held]
        context.attributes = kept + [t for i, t in fresh.items() if i in plain]
