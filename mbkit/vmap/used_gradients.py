"""Which models a backward pass has reached a parameter for: the others have no gradient there, as alone.

Where models run one after the other they can take different ways, so a step may use a parameter for some models only.
Alone, the others' gradient is None and their optimizer leaves the parameter be; in a stacked gradient theirs is a row
of zeros, which momentum and weight decay would still act upon. The autograd graph knows: it splits into the models'
own graphs at each stack of M tensors, so one walk over it tells which models arrive where. What it finds is kept on
the gradient itself and goes when the gradient goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["mark_rows", "models_with_gradient", "note_models_with_gradient", "watch_backward"]

_ROWS = "mbkit_rows"  # in a node's metadata: its i-th input belongs to model i
_REACHED = "mbkit_reached"  # on a gradient: the models as bits of an int; without it, all


def mark_rows(stack: Tensor) -> Tensor:
    """Note on the result of `torch.stack` that its M inputs are the models' own, and return it."""
    if stack.grad_fn is not None:
        stack.grad_fn.metadata[_ROWS] = True
    return stack


def models_with_gradient(gradient: Tensor, num_models: int) -> Tensor | None:
    """Return which models have a gradient here, `[M]`, or None where all have one.

    A row with a number in it has come from somewhere, if only by a way outside the batch's calls: a penalty on the
    parameters, say, or another pass.
    """
    bits = getattr(gradient, _REACHED, None)
    if bits is None:
        return None
    known = torch.tensor([bool(bits >> m & 1) for m in range(num_models)], device=gradient.device)
    return known | (gradient != 0).reshape(num_models, -1).any(1)


def note_models_with_gradient(gradient: Tensor, reached: Sequence[bool]) -> None:
    """Note on a gradient `[M, ...]` which models have one."""
    if not all(reached):
        setattr(gradient, _REACHED, sum(1 << m for m, is_reached in enumerate(reached) if is_reached))


def watch_backward(outputs: Iterable[Any], num_models: int) -> None:
    """Have every backward pass that comes through one of the outputs note which models it reaches a parameter for.

    Args:
        outputs: tensors `[M, ...]`; anything else is passed over.
        num_models: M.
    """
    for output in outputs:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.register_prehook(partial(_arrive, num_models))


class _Pass:
    """One backward pass: the nodes walked over, and the leaves found."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.found: dict[int, _Leaf] = {}


class _Leaf:
    """A parameter that a pass reaches: for which models, and its gradient from before."""

    def __init__(self, tensor: Tensor, num_models: int) -> None:
        self.tensor, self.everyone, self.bits = tensor, (1 << num_models) - 1, 0
        self.before = tensor.grad
        self.version = None if self.before is None else self.before._version


_passes: dict[int, _Pass] = {}  # by the number that autograd gives the pass


def _arrive(num_models: int, gradients: Any) -> None:
    """Walk over the graph below the node that autograd is about to run, unless the pass has come by already."""
    number, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
    if number not in _passes:
        for stale in list(_passes)[:-8]:  # a pass that raised never comes to its end
            del _passes[stale]
        _passes[number] = _Pass()
        torch.autograd.Variable._execution_engine.queue_callback(partial(_finish, number))
    current = _passes[number]
    if node in current.seen:  # on the way from a loss, which may have come for some models only
        return
    for tensor, bits in _walk(node, num_models, current.seen):
        current.found.setdefault(id(tensor), _Leaf(tensor, num_models)).bits |= bits


def _finish(number: int) -> None:
    """Note on the new gradients which models have one: those of this pass and of the ones that were added up."""
    for leaf in _passes.pop(number).found.values():
        gradient, bits = leaf.tensor.grad, leaf.bits
        if gradient is None or (gradient is leaf.before and gradient._version == leaf.version):
            continue  # autograd.grad, which leaves .grad alone
        if leaf.before is not None:
            bits |= getattr(leaf.before, _REACHED, leaf.everyone)
        if bits != leaf.everyone:
            setattr(gradient, _REACHED, bits)
        elif hasattr(gradient, _REACHED):
            delattr(gradient, _REACHED)


def _walk(root: Any, num_models: int, seen: set[Any]) -> list[tuple[Tensor, int]]:
    """Return the leaves below a node, each with the models that reach it."""
    order, stack = [], [(root, iter(root.next_functions))]
    local = {root}
    while stack:  # depth first; a node is put down after all that it leads to
        node, following = stack[-1]
        step = next(following, None)
        if step is None:
            order.append(node)
            stack.pop()
        elif step[0] is not None and step[0] not in local:
            local.add(step[0])
            stack.append((step[0], iter(step[0].next_functions)))
    arriving = dict.fromkeys(order, 0)
    arriving[root] = (1 << num_models) - 1
    leaves = []
    for node in reversed(order):
        bits, apart = arriving[node], _ROWS in node.metadata
        if hasattr(node, "variable"):
            leaves.append((node.variable, bits))
        for i, (after, _) in enumerate(node.next_functions):
            if after is not None:
                arriving[after] |= bits & (1 << i) if apart else bits
    seen |= local
    return leaves
