"""Training a batch in chunks of models: parts that share its memory, one after the other.

A chunk is a CallContext whose tensors are rows of the whole batch's tensors and whose streams are the batch's own, so
what it trains is trained. Only one chunk's activations exist at a time: they fit into memory, or into the cache. The
largest chunk is the whole batch, all models at once; a chunk of one model runs in plain PyTorch, without vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..batch.call import call_models
from ..batch.context import CallContext, context_of
from ..batch.kept import kept_by
from ..batch.loss import call_losses, loss_code, one_number
from ..batch.memory import Memory
from ..batch.model_batch import ModelBatch
from ..batch.targets import targets_at
from ..common.checks import check_inputs, check_output, open_mappings
from ..common.machine import free_memory
from ..vmap import HOOKS, Absent, SharedObjects, State, copy_module, has_grad_hooks, keep_hooks, new_hooks
from .backward import backward_pass, is_main_thread
from .gather import Gradients, join_outputs, keep_state
from .loop import arguments, call, detach, first_tensor
from .options import StepOptions
from .saved_bytes import MadeBytes, saved_bytes

# Bytes that one chunk's activations may take. In larger chunks LeNets, ResNets and GPTs took less time each; but a
# process takes nearly three times as much as the activations of one chunk, and beyond this size the gain is small: no
# more than three chunks are left as one.
_ENOUGH = {"cpu": 256 << 20}
_ENOUGH_ELSEWHERE = 4 << 30
_SHARE = 0.5  # of the free memory that they may take


class Chunks:
    """Cuts a batch into chunks of `size` models, and makes the forward and backward passes chunk by chunk.

    A batch whose calls or gradients somebody watches stays whole.

    Args:
        batch: M models.
        size: how many models make a chunk; the last one may have fewer. None to choose it by the bytes that a model
            keeps, which the first call finds out on its first few models; two equal runs choose the same, unless
            memory is short.

    Attributes:
        size: the same; known after the first call.
        bytes_each: known after the first call: what a model's forward pass keeps for its backward pass, beside weights
            and inputs; where there is to be none, all that it makes.
        how: in words, how the last pass was made.
    """

    def __init__(self, batch: nn.Module, size: int | None = None) -> None:
        self.batch, self.num_models = batch, batch.num_models
        self.size = size if size is None else min(size, self.num_models)
        self.bytes_each, self.how = 0, ""
        self._memory_is_short = self._has_stepped = False
        self._rows: dict[int, tuple[Tensor, int, dict]] = {}  # by the id of a tensor of the whole batch
        self._steady: dict[int, dict] = {}  # by a chunk's first model; see `Memory`

    @property
    def _first_size(self) -> int:
        """The size, or that of the chunk by which it is chosen."""
        return self.size or max(4, -(-self.num_models // 16))

    def call(self, x: Any, shared_input: bool) -> Any:
        """Return what the batch returns for these inputs, without gradients."""
        if not _calls_are_own(self.batch):
            return call(partial(self.batch, shared_input=shared_input), x)
        if self._is_one_by_one:

            def plainly(m: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
                out = module(*args, **kwargs)
                check_output(out, module)
                return out

            return call_models(context_of(self.batch), *arguments(x), shared_input, plainly)
        return join_outputs([(out, chunk.num_models) for _, chunk, out in self._calls(x, shared_input)])

    def backward(
        self, x: Any, y: Any, options: StepOptions, parameters: list[nn.Parameter] | None = None
    ) -> tuple[Tensor, Any]:
        """Add up the gradients of all models, given or not; return the losses [M] and the outputs, detached."""
        batch, context = self.batch, context_of(self.batch)
        parameters = list(batch.parameters()) if parameters is None else parameters
        is_cleared = all(p.grad is None for p in parameters)  # or new gradients are added to those, as torch does
        if not _calls_are_own(batch) or any(map(has_grad_hooks, parameters)) or not is_cleared:
            self.how = "all models at once"
            return _backward_of_the_whole(batch, x, y, options)
        gradients = Gradients(parameters, self.num_models)
        undo = None if self._has_stepped else Memory(context, State(context.template)).undo
        try:
            if self._is_one_by_one:
                self.how = "one by one"
                losses, outputs = self._one_by_one(x, y, options, gradients)
            else:
                parts = []
                for models, chunk, out in self._calls(x, batch.shared_input, options.loss_fn):
                    losses = self._losses(chunk, out, y, options, models)
                    parts.append(((losses, detach(out)), chunk.num_models))
                    if chunk is not context:
                        gradients.take(chunk.template.parameters(), models)
                losses, outputs = join_outputs(parts)
        except BaseException as error:
            gradients.drop()
            if undo is not None and isinstance(error, (TypeError, ValueError)):
                undo(error)  # in the first step: who corrects the loss or the targets starts from the same state
            raise
        self._has_stepped = True
        gradients.note()
        context.latest_losses = losses
        return losses, outputs

    @property
    def _is_one_by_one(self) -> bool:
        """Whether models run in plain PyTorch: by themselves vmap costs more than it saves.

        In another thread they do not: a model by itself draws from torch's default generator, as whoever is in the main
        thread does meanwhile.
        """
        return self.size == 1 and is_main_thread()

    def _one_by_one(self, x: Any, y: Any, options: StepOptions, gradients: Gradients) -> tuple[Tensor, Any]:
        """Make each model's forward and backward pass in plain PyTorch, in its turn, with its own random numbers."""
        context = context_of(self.batch)
        kept = kept_by(context, options.loss_fn)
        context.streams.meet(loss_code(options.loss_fn))

        def step(m: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Any]:
            parameters = list(module.parameters())
            gradients.expect(parameters)
            args, kwargs = tree_map_only(Tensor, _apart, (args, kwargs))
            out = module(*args, **kwargs)
            check_output(out, module)
            loss = one_number(options.loss_of_model(m, self.num_models)(out, y))
            kept.refuse_trained(loss, out)
            backward_pass(loss, is_shared=False)
            gradients.take(parameters, slice(m, m + 1))
            return loss.detach(), detach(out)

        return call_models(context, *arguments(x), self.batch.shared_input, step)

    def _losses(self, chunk: CallContext, out: Any, y: Any, options: StepOptions, models: slice) -> Tensor:
        """Make the backward pass of a chunk; return its losses, detached."""
        some, settings = first_tensor(out), options.settings_of(self.num_models)
        is_part = chunk is not context_of(self.batch)
        if is_part and some is not None:  # or else call_losses says what is wrong
            shared = options.forms.of(y, (self.num_models, *some.shape[1:]), self.num_models)
            y = targets_at(y, shared, models)
        settings = settings.of_models(models) if is_part else settings
        losses = call_losses(chunk, out, y, options.loss_fn, options.forms, settings)
        backward_pass(losses)
        return losses.detach()

    def _calls(
        self, x: Any, shared_input: bool, loss_fn: Callable | None = None
    ) -> Iterator[tuple[slice, CallContext, Any]]:
        """Call chunk after chunk; yield (models, chunk, outputs), and keep what the calls have assigned anew."""
        whole, inputs = context_of(self.batch), _inputs(x, shared_input)
        kept = kept_by(whole, loss_fn)
        if self._first_size >= self.num_models:
            self.how = "all models at once"
            yield slice(self.num_models), whole, self._measured(whole, *inputs, shared_input)
            return
        if not shared_input:
            check_inputs(tree_leaves(inputs), self.num_models)
        before, after, sizes, changed, stop = State(whole.template), [], [], set(), 0
        shared, assigned, hooks = SharedObjects(), [], []
        for key, value in before.items():
            shared.note(key[2], tree_leaves(value))
        self.how = "in chunks"  # the first call chooses the size
        if self.size is not None:
            short = ", because memory is short" if self._memory_is_short else ""
            self.how = "one by one" if self.size == 1 else f"in chunks of {self.size}{short}"
        with kept.in_parts(self.num_models) as part:
            while stop < self.num_models:
                models = slice(stop, min(stop + self._first_size, self.num_models))
                chunk, stop = self._chunk(models), models.stop
                with part(models):
                    given = State(chunk.template)
                    args, kwargs = inputs if shared_input else tree_map_only(Tensor, partial(_rows, models), inputs)
                    yield models, chunk, self._measured(chunk, args, kwargs, shared_input)
                    assigned.append(shared.take_back())
                    whole.folding, whole.own_rows = chunk.folding, chunk.own_rows  # what it has learnt
                    hooks.append(new_hooks(before, chunk.template))
                    now = State(chunk.template)
                    now |= dict.fromkeys(given.keys() - now.keys(), Absent)
                    after.append(now)
                    changed |= {key for key, value in now.items() if value is not given.get(key)}
                    sizes.append(chunk.num_models)
        SharedObjects.keep(assigned)
        keep_hooks(before, hooks)
        keep_state(whole, before, after, sizes, changed)

    def _measured(self, chunk: CallContext, args: tuple, kwargs: dict, shared_input: bool) -> Any:
        """Call a chunk; choose the size by the bytes of the first one."""
        if self.size is not None:
            return call_models(chunk, args, kwargs, shared_input)
        if torch.is_grad_enabled():
            out = call_models(chunk, args, kwargs, shared_input)
            taken = saved_bytes(out, (list(chunk.template.parameters()), args, kwargs))
        else:
            with MadeBytes() as made:
                out = call_models(chunk, args, kwargs, shared_input)
            taken = made.total
        self.bytes_each = max(1, taken // chunk.num_models)
        self.size = self.largest(first_tensor(out).device)
        return out

    def largest(self, device: torch.device) -> int:
        """Return how many models go at once by what each takes: a constant, or less where memory is short."""
        size = min(self.num_models, _ENOUGH.get(device.type, _ENOUGH_ELSEWHERE) // self.bytes_each)
        size = self.num_models if 3 * size > self.num_models else size
        room = int(_SHARE * free_memory(device)) // self.bytes_each
        self._memory_is_short = room < size
        size = max(1, min(size, room))
        return -(-self.num_models // -(-self.num_models // size))  # chunks of one size, or nearly

    def _chunk(self, models: slice) -> CallContext:
        whole = context_of(self.batch)
        tensors = [*whole.template.parameters(), *whole.template.buffers(), *whole.attributes]
        own = {id(t): self._row(t, models) for t in tensors}
        frozen = None if whole.frozen is None else whole.frozen[models]
        return replace(
            whole,
            template=copy_module(whole.template, own, models, alone=True),
            attributes=[own[id(t)] for t in whole.attributes],
            num_models=models.stop - models.start,
            streams=whole.streams.part(models.start, models.stop),
            frozen=frozen if frozen is not None and frozen.any() else None,
            steady=self._steady.setdefault(models.start, {}),
        )

    def _row(self, tensor: Tensor, models: slice) -> Tensor:
        """Return a chunk's rows of a tensor: always the same object, for as long as the tensor is the same."""
        if tensor.layout is not torch.strided:  # a constant such as a graph's edges; its rows have no address to share
            numbers = torch.arange(models.start, models.stop, device=tensor.device)
            return tensor.detach().index_select(0, numbers)
        known, pointer, rows = self._rows.get(id(tensor), (None, 0, {}))
        if known is not tensor or pointer != tensor.data_ptr():
            rows = {}
            self._rows[id(tensor)] = (tensor, tensor.data_ptr(), rows)
        key = models.start, models.stop
        if key not in rows:
            row = tensor.detach()[models]
            is_parameter = isinstance(tensor, nn.Parameter)
            rows[key] = nn.Parameter(row, requires_grad=tensor.requires_grad) if is_parameter else row
        return rows[key].requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _calls_are_own(batch: nn.Module) -> bool:
    """Say whether a batch's calls are ModelBatch's own and nobody looks on: a part of it may be called instead."""
    verbs = ("forward", "compute_loss")
    own = all(getattr(type(batch), v, None) is getattr(ModelBatch, v) and v not in vars(batch) for v in verbs)
    return own and not any(vars(batch)[hooks] for hooks in HOOKS)


def _backward_of_the_whole(batch: nn.Module, x: Any, y: Any, options: StepOptions) -> tuple[Tensor, Any]:
    """Do what `Chunks.backward` does through the batch's own calls, which somebody watches or has made anew."""
    outputs = call(batch, x)
    rest = {"shared_targets": options.forms, "loss_settings": options.settings_of(batch.num_models)}
    losses = batch.compute_loss(outputs, y, options.loss_fn, "none", **rest)
    backward_pass(losses)
    return losses.detach(), detach(outputs)


def _inputs(x: Any, shared: bool) -> tuple[tuple, dict]:
    """Return a call's arguments and keyword arguments; what a forward writes into its own goes into no later graph."""
    given = arguments(x)
    return given if shared else tree_map_only(Tensor, _apart, open_mappings(given))


def _rows(models: slice, tensor: Tensor) -> Tensor:
    return _apart(tensor)[models]


def _apart(tensor: Tensor) -> Tensor:
    """Detach an input: a forward may edit it, and one model's edit is no part of the next one's graph."""
    return tensor if tensor.requires_grad else tensor.detach()
