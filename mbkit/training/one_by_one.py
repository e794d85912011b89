"""Training a batch one model after the other, in plain PyTorch, on each model's own rows of the stacked tensors.

It saves what vmap costs, for two or three small models and where a lone model's kernels already fill the machine; the
update is still one for all models. The modules that hold the rows are made once, and used for as long as the batch's
own module looks the same: to make them for every step would take longer than many a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..batch.call import kept_attributes
from ..batch.context import context_of
from ..batch.freeze import held
from ..batch.kept import kept_by, turns_in_parts
from ..batch.loss import one_loss
from ..batch.targets import TargetForms, targets_at
from ..common.checks import check_inputs, check_output
from ..vmap import (
    OUTPUT,
    Snapshot,
    copy_module,
    flattened,
    has_grad_hooks,
    materialize,
    merge,
    note_models_with_gradient,
    outcome,
    read_state,
    stack_alike,
    tensors_in,
    write_state,
)
from .chunks import backward_at_once, calls_are_own, weighed
from .loop import call, detach, first_tensor, part

__all__ = ["OneByOne"]


class OneByOne:
    """Makes the forward and backward passes of a batch's M models one model after the other.

    Args:
        batch: M models; in a step for which they do not `fit`, they go all at once.

    Attributes:
        bytes_each: known after the first call: what a model's forward pass keeps for its backward pass.
    """

    def __init__(self, batch: nn.Module) -> None:
        self.batch = batch
        self.bytes_each = 0
        self._look: Snapshot | None = None
        self._stacks: list[Tensor] = []

    @staticmethod
    def fits(batch: nn.Module) -> bool:
        """Say whether each model has every tensor to itself, and nobody looks at the batch's own calls or gradients."""
        context = context_of(batch)
        tensors = tensors_in(read_state(context.template))
        stacked = {id(t) for t in (*batch.parameters(), *batch.buffers(), *context.attributes)}
        own = all(id(t) in stacked and t.layout is torch.strided for t in tensors)
        return own and _is_plain(batch) and not any(map(has_grad_hooks, tensors))

    def backward(self, x: Any, y: Any, loss_fn: Callable, forms: TargetForms) -> tuple[Tensor, Any]:
        """Add up the gradients of all models; return the losses [M] and the outputs, detached."""
        batch = self.batch
        if not self._keep_up():
            return backward_at_once(batch, x, y, loss_fn, forms)
        if not batch.shared_input:
            check_inputs(tree_leaves(x), batch.num_models)
        try:
            context, device = context_of(batch), self._stacks[0].device
            parts = kept_by(context, loss_fn).in_parts(batch.num_models)
            with held(context), batch.streams.take_turns(device) as turns, parts as part:
                losses, records = self._in_turn(turns_in_parts(turns, part), x, y, loss_fn, forms)
                outputs = self._keep(records)
        except BaseException:
            self._look = None  # a call that was cut short may have left its module in any state
            raise
        context_of(batch).latest_losses = torch.stack(losses)
        return batch.latest_losses, outputs

    def _in_turn(
        self, turns: Iterator[int], x: Any, y: Any, loss_fn: Callable, forms: TargetForms
    ) -> tuple[list[Tensor], list[dict]]:
        """Return each model's loss, and what its call returned, with the whole state where it has changed any."""
        batch, losses, records = self.batch, [], []
        if torch.is_autocast_enabled(self._stacks[0].device.type):
            torch.clear_autocast_cache()  # it keeps casts of weights, which an update has changed since
        gradients = _Gradients(self._twins[0][-1])
        for m in turns:
            twin, look, given, rows = self._twins[m]
            mine = x if batch.shared_input else part(x, m)
            with nullcontext() if self.bytes_each else weighed((list(twin.parameters()), mine)) as sizes:
                out = call(twin, mine)
            self.bytes_each = self.bytes_each or max(1, sum(sizes))
            check_output(out, context_of(batch).template)
            shared = forms.of(y, (batch.num_models, *first_tensor(out).shape), batch.num_models)
            loss = one_loss(loss_fn, out, targets_at(y, shared, m))
            kept_by(context_of(batch)).refuse_trained(loss)
            gradients.backward(loss, m, rows)
            losses.append(loss.detach())
            record = {OUTPUT: detach(out)}
            records.append(record if look.unchanged else outcome(twin, given, self._before, set(), record[OUTPUT], m))
        gradients.hand_over()
        return losses, records

    def _keep(self, records: list[dict]) -> Any:
        """Keep what the calls have changed, if anything; return the outputs."""
        context = context_of(self.batch)
        if all(len(record) == 1 for record in records):
            outputs = [record[OUTPUT] for record in records]
            if all(isinstance(out, Tensor) and out.shape == outputs[0].shape for out in outputs):
                return stack_alike(outputs)
        merged, fresh = merge([self._before | record for record in records], self._before, self._known, whole=True)
        outputs, after, new = materialize(merged, [stack_alike(column) for column in fresh])
        write_state(context.template, self._before, after)
        context.attributes = kept_attributes(after, [*context.attributes, *new])
        self._look = None
        return outputs

    def _keep_up(self) -> bool:
        """Make the models' own modules, unless those at hand still look like the batch's; say whether they can be."""
        batch, template = self.batch, context_of(self.batch).template
        if self._look is not None and self._look.unchanged:
            return _is_plain(batch)
        if not self.fits(batch):
            return False
        self._before = read_state(template)
        self._stacks = stacks = tensors_in(self._before)
        columns = [_rows(stack) for stack in stacks]
        self._twins, self._known = [], []
        for m in range(batch.num_models):
            own = [(stack, column[m]) for stack, column in zip(stacks, columns, strict=True)]
            twin = copy_module(template, {id(stack): row for stack, row in own}, m, alone=True)
            rows = [(stack, row) for stack, row in own if isinstance(stack, nn.Parameter) and stack.requires_grad]
            self._twins.append((twin, Snapshot(twin, settings=False), flattened(twin), rows))
            self._known.append({id(stack): stack for stack in stacks} | {id(row): stack for stack, row in own})
        self._look = Snapshot(template)
        return True


class _Gradients:
    """The stacked gradients of a step, into which each model's backward pass adds its own.

    Args:
        rows: the trained stacked parameters, each with a model's own.
    """

    def __init__(self, rows: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
        self._stacks = [whole for whole, _ in rows]
        self._grads = [torch.zeros_like(whole) for whole in self._stacks]
        self._parts = [grad.unbind(0) for grad in self._grads]
        self._reached: list[list[bool]] = []

    def backward(self, loss: Tensor, m: int, rows: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Make model m's backward pass; what it adds nothing to, it has no gradient for."""
        for (_, row), parts in zip(rows, self._parts, strict=True):
            row.grad = parts[m]
        before = [grad._version for grad in self._grads]
        loss.backward()
        self._reached.append([grad._version != version for grad, version in zip(self._grads, before, strict=True)])
        for _, row in rows:
            row.grad = None

    def hand_over(self) -> None:
        """Make them the stacked parameters' gradients."""
        for whole, grad, reached in zip(self._stacks, self._grads, zip(*self._reached, strict=True), strict=True):
            if any(reached):
                whole.grad = grad
                note_models_with_gradient(grad, reached)


def _is_plain(batch: nn.Module) -> bool:
    """Say whether the batch's calls are ModelBatch's own, and nobody draws random numbers meanwhile."""
    # One by one the models draw from torch's default generator, as whoever is in the main thread does.
    return threading.current_thread() is threading.main_thread() and calls_are_own(batch)


def _rows(stack: Tensor) -> list[Tensor]:
    """Return the models' own tensors, in the stack's memory."""
    rows = stack.detach().unbind(0)
    if isinstance(stack, nn.Parameter):
        return [nn.Parameter(row, requires_grad=stack.requires_grad) for row in rows]
    return [row.requires_grad_(stack.requires_grad) for row in rows]
