"""Training a batch in chunks of models: parts that share its memory, one after the other.

A chunk is a ModelBatch whose tensors are rows of the whole batch's tensors and whose streams are the whole batch's own,
so what it trains is trained. Only one chunk's activations exist at a time: they fit into memory, or into the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from .loop import call, detach
from .operators import BatchingError, Own, note_reached, reached_models, read_state, replica, write_state
from .stacked_call import loss_code, targets_of_models

if TYPE_CHECKING:
    from .model_batch import ModelBatch

__all__ = ["Chunks"]


class Chunks:
    """Cuts a batch into chunks of `size` models, and makes the forward and backward passes chunk by chunk.

    Args:
        batch: M models.
        size: how many models make a chunk; the last one may have fewer.
        apart: call the models of a chunk one after the other in plain PyTorch, without `torch.vmap`.

    Attributes:
        bytes_each: what a model's forward pass keeps for its backward pass, known after the first `backward`.
    """

    def __init__(self, batch: ModelBatch, size: int, apart: bool = False) -> None:
        self.batch, self.size, self.apart = batch, size, apart
        self.bytes_each = 0
        self._rows: dict[int, tuple[Tensor, int, list[Tensor]]] = {}  # by the id of a tensor of the whole batch
        self._steady: list[dict] = [{} for _ in range(-(-batch.num_models // size))]  # see model_call.Memory

    def __iter__(self) -> Iterator[tuple[int, int, ModelBatch]]:
        """Yield (first model, the one after the last, chunk)."""
        for number, start in enumerate(range(0, self.batch.num_models, self.size)):
            stop = min(start + self.size, self.batch.num_models)
            yield start, stop, self._chunk(number, start, stop)

    def backward(self, x: Any, y: Any, loss_fn: Callable, shared_targets: bool | None) -> tuple[Tensor, Any]:
        """Add up the gradients of all models; return the losses [M] and the outputs, detached."""
        batch, losses, outputs, after = self.batch, [], [], []
        gradients: dict[nn.Parameter, list[list[bool]]] = {}
        before = read_state(batch._template)
        for start, stop, chunk in self:
            given = read_state(chunk._template)
            mine = x if batch.shared_input else tree_map_only(Tensor, lambda t, a=start, b=stop: t[a:b], x)
            with self._weighed(chunk) if start == 0 and not self.bytes_each else nullcontext():
                out = call(chunk, mine)
            targets, shared = targets_of_models(y, out, batch.num_models, start, stop, shared_targets)
            if self.apart:
                chunk.__dict__["_slow_losses"] = {loss_code(loss_fn)}
            loss = chunk.compute_loss(out, targets, loss_fn, reduction="none", shared_targets=shared)
            loss.sum().backward()
            _collect(batch, chunk, start, stop, gradients)
            losses.append(loss.detach())
            outputs.append(detach(out))
            now = read_state(chunk._template)
            after.append({key: value for key, value in now.items() if value is not given.get(key)})
        for parameter, flags in gradients.items():
            note_reached(parameter.grad, [flag for row in flags for flag in row])
        _keep(batch, before, after)
        batch.__dict__["latest_losses"] = torch.cat(losses)
        return batch.latest_losses, tree_map(lambda *parts: torch.cat(parts), *outputs)

    @contextmanager
    def _weighed(self, chunk: ModelBatch) -> Iterator[None]:
        weights, storages = {p.untyped_storage().data_ptr() for p in chunk.parameters()}, {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        total = sum(size for pointer, size in storages.items() if pointer not in weights)
        self.bytes_each = max(1, total // chunk.num_models)

    def _chunk(self, number: int, start: int, stop: int) -> ModelBatch:
        batch = self.batch
        template = batch._template
        tensors = [*template.parameters(), *template.buffers(), *batch._attributes]
        own = {id(t): self._row(t, number) for t in tensors}
        twin = replica(template, own, slice(start, stop), alone=True)
        chunk = object.__new__(type(batch))
        frozen = None if batch._frozen is None else batch._frozen[start:stop]
        chunk.__dict__ = {
            **batch.__dict__,
            **{name: twin.__dict__[name] for name in ("_parameters", "_buffers", "_modules")},
            "_template": twin,
            "_attributes": [own[id(t)] for t in batch._attributes],
            "num_models": stop - start,
            "seeds": batch.seeds[start:stop],
            "streams": batch.streams.part(start, stop),
            "_frozen": frozen if frozen is not None and frozen.any() else None,
            "_steady": self._steady[number],
            "model_by_model": {""} if self.apart else batch.model_by_model,
        }
        return chunk

    def _row(self, tensor: Tensor, number: int) -> Tensor:
        """Return the chunk's rows of a tensor: always the same object, for as long as the tensor is the same."""
        known, pointer, rows = self._rows.get(id(tensor), (None, 0, []))
        if known is not tensor or pointer != tensor.data_ptr():
            rows = list(tensor.detach().split(self.size))
            if isinstance(tensor, nn.Parameter):
                rows = [nn.Parameter(row, requires_grad=tensor.requires_grad) for row in rows]
            self._rows[id(tensor)] = (tensor, tensor.data_ptr(), rows)
        return rows[number].requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _collect(batch: ModelBatch, chunk: ModelBatch, start: int, stop: int, found: dict) -> None:
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
        reached = reached_models(own.grad, stop - start)
        found[whole].append([True] * (stop - start) if reached is None else reached.tolist())
        own.grad = None


def _keep(batch: ModelBatch, before: dict, after: list[dict]) -> None:
    """Put together what the chunks' calls assigned anew, and keep it in the batch."""
    changed = {key for state in after for key in state}
    fresh: dict[int, Tensor] = {}

    def join(name: str, column: tuple) -> Any:
        if all(isinstance(leaf, Tensor) for leaf in column):
            whole = torch.cat(column)
            fresh[id(whole)] = whole
            return whole
        if all(isinstance(leaf, Own) for leaf in column):
            return Own([value for leaf in column for value in leaf.values])
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
        write_state(batch._template, before, state)
        plain = {id(t) for key in changed if key[1] == "__dict__" for t in tree_flatten(state[key])[0]}
        held = {id(t) for value in state.values() for t in tree_flatten(value)[0]}
        kept = [t for t in batch._attributes if id(t) in held]
        batch.__dict__["_attributes"] = kept + [t for i, t in fresh.items() if i in plain]
