"""What a backward pass leaves on stacked tensors: gradients in memory of their own, and which models have one.

Memory. autograd gives a leaf the very gradient that arrives, without a copy. Where two leaves are added up, that can
be one and the same memory (in `x + a + b` under vmap, if x has one row), and then an edit in place of one gradient (a
second backward pass, clipping, a scaler) edits the other. So at the end of a pass shared memory is taken apart. torch
itself shares it as well in rarer cases, `a.view(6) + b.view(6)`, and then adds up wrong sums; a batch does not.

Used gradients. Where models run one after the other they can take different ways, so a step may use a parameter for
some models only. Alone, the others' gradient is None and their optimizer leaves the parameter be; in a stacked gradient
theirs is a row of zeros, which momentum and weight decay would still act upon. The autograd graph knows: it splits into
the models' own graphs at each stack of M tensors, so one walk over it tells which models arrive where. What it finds
is kept on the gradient itself and goes when the gradient goes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.objects import tensors_of

_ROWS = "mbkit_rows"  # in a node's metadata: its i-th input belongs to model i
_PRESENT = "mbkit_present"  # on a gradient: the models as bits of an int; without it, all


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
    bits = getattr(gradient, _PRESENT, None)
    if bits is None:
        return None
    known = torch.tensor([bool(bits >> m & 1) for m in range(num_models)], device=gradient.device)
    return known | (gradient != 0).reshape(num_models, -1).any(1)


def note_models_with_gradient(gradient: Tensor, present: Sequence[bool]) -> None:
    """Note on a gradient `[M, ...]` which models have one."""
    _note(gradient, sum(1 << m for m, is_present in enumerate(present) if is_present), len(present))


def _note(gradient: Tensor, bits: int, num_models: int) -> None:
    if bits != (1 << num_models) - 1:
        setattr(gradient, _PRESENT, bits)
    elif hasattr(gradient, _PRESENT):
        delattr(gradient, _PRESENT)


def watch_backward(outputs: Iterable[Any], leaves: Iterable[Any], num_models: int, some_models: bool = True) -> None:
    """Have every backward pass that comes through one of the outputs look after the gradients that it leaves behind.

    Args:
        outputs: what a call returned; anything that is not a tensor with a graph is passed over.
        leaves: tensors whose gradients must not share memory; anything that is not a leaf of a graph is passed over.
        num_models: M; the outputs are `[M, ...]`.
        some_models: whether the call may have used a parameter for some models only.
    """
    nodes = {t.grad_fn for t in outputs if isinstance(t, Tensor) and t.grad_fn is not None}
    if nodes:
        leaves = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad and t.is_leaf]
    for node in nodes:
        node.register_prehook(partial(_arrive, leaves, num_models if some_models and num_models > 1 else 0))


class _Pass:
    """One backward pass.

    Attributes:
        leaves: the tensors whose gradients must not share memory, by their ids.
        reached: the nodes of the graph that are walked over, each with the models that arrive there, as bits.
        found: of the nodes among them that stand for a leaf: M, its gradient from before, and that one's version.
    """

    def __init__(self) -> None:
        self.leaves: dict[int, Tensor] = {}
        self.reached: dict[Any, int] = {}
        self.found: dict[Any, tuple[int, Tensor | None, int]] = {}

    def walk(self, root: Any, num_models: int) -> None:
        """Walk over the graph below a node at which all models arrive."""
        self.reached[root] = (1 << num_models) - 1
        waiting = deque([root])
        while waiting:  # a node is met again when more models arrive
            node = waiting.popleft()
            if hasattr(node, "variable") and node not in self.found:
                before = node.variable.grad
                self.found[node] = num_models, before, 0 if before is None else before._version
            bits, apart = self.reached[node], _ROWS in node.metadata
            for i, (after, _) in enumerate(node.next_functions):
                known = self.reached.get(after, 0)
                more = (bits & 1 << i if apart else bits) & ~known
                if after is not None and more:
                    self.reached[after] = known | more
                    if not waiting or waiting[-1] is not after:
                        waiting.append(after)


_passes: dict[int, _Pass] = {}  # by the number that autograd gives the pass


def _arrive(leaves: list[Tensor], num_models: int, gradients: Any) -> None:
    """Note the leaves; walk over the graph below the node that is about to run, unless the pass has come by already."""
    number = torch._C._current_graph_task_id()
    if number not in _passes:
        for stale in list(_passes)[:-8]:  # a pass that raised never comes to its end
            del _passes[stale]
        _passes[number] = _Pass()
        torch.autograd.Variable._execution_engine.queue_callback(partial(_finish, number))
    current = _passes[number]
    current.leaves.update((id(t), t) for t in leaves)
    node = torch._C._current_autograd_node()
    if num_models and node not in current.reached:  # else on the way from a loss, which may have come for some only
        current.walk(node, num_models)


def _finish(number: int) -> None:
    """Take shared memory apart, and note on the new gradients which models have one."""
    current = _passes.pop(number)
    separate_gradients(current.leaves.values())
    for node, (num_models, before, version) in current.found.items():
        gradient, bits = node.variable.grad, current.reached[node]
        if gradient is None or (gradient is before and gradient._version == version):
            continue  # autograd.grad, which leaves .grad alone
        if before is not None:
            bits |= getattr(before, _PRESENT, (1 << num_models) - 1)
        _note(gradient, bits, num_models)


def separate_gradients(tensors: Iterable[Tensor]) -> None:
    """Give gradients memory of their own where two of them share some."""
    held = [(grad, tensor) for tensor in tensors if (grad := tensor.grad) is not None and grad.layout is torch.strided]
    end = 0
    for start, i in sorted((grad.data_ptr(), i) for i, (grad, _) in enumerate(held)):
        grad, tensor = held[i]
        if start < end:
            tensor.grad = grad.clone()
        else:
            end = start + grad.nbytes  # autograd's gradients are dense


def graph_nodes(outputs: Any) -> Iterator[Any]:
    """Yield each node of the graph below the outputs once."""
    waiting = [t.grad_fn for t in tensors_of(outputs) if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
