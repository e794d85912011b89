"""Derivatives that a model or a loss takes itself with `torch.autograd.grad`, for M models at once.

Under vmap autograd records what happens to the stacked tensors, so one pass over their graph gives each model its own
derivatives, as long as no model's outputs depend on another model's numbers. What all models share, such as the points
at which a differential equation has to hold, would get one gradient, the sum over the models. So shared tensors that
require gradients are laid out in rows, one for each model, and the graph notes where. Derivatives with respect to a
shared tensor are those with respect to its rows, each led back to the tensor on its own.

Inputs are laid out before the call, what is made inside as soon as it is to require gradients. For a tensor from
anywhere else the call starts again, with all operators looking out for shared tensors that require gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import BatchingError, SharedInput
from ..registry import RULES_INSIDE, Pass, rule
from ..unwrap import SHARED, as_stacked
from .rectified import show_gradient

_UNUSED = (
    "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if this is "
    "the desired behavior."
)


def _shared(tensor: Tensor) -> Tensor | None:
    """Return the tensor of all models that this one is, or has the rows of; None if it is each model's own."""
    if not functorch.is_batchedtensor(tensor):
        return tensor
    node = functorch.get_unwrapped(tensor).grad_fn
    return None if node is None else node.metadata.get(SHARED)


def _in_memory(tensor: Tensor) -> Tensor:
    shared = _shared(tensor)
    if shared is None:
        show_gradient(shared := functorch.get_unwrapped(tensor))
    return shared


_FACTS = [Tensor.requires_grad.__get__, Tensor.is_leaf.__get__, Tensor.grad_fn.__get__]


@rule(*_FACTS)
@rule(*_FACTS, table=RULES_INSIDE)
def _read(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """What one model sees of a stack has no graph; a model that branches on that alone must do so here."""
    return operator(_in_memory(args[0]))


@rule(Tensor.requires_grad_, Tensor.requires_grad.__set__)
def _require(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """vmap refuses the one and misunderstands the other."""
    tensor, *rest = args
    mode.own_rows |= not functorch.is_batchedtensor(tensor)
    with temporarily_pop_interpreter_stack():
        operator(_in_memory(tensor), *rest, **kwargs)
    return tensor


@rule(torch.autograd.grad)
def _grad(mode: Pass, operator: Callable, args: tuple, kwargs: dict) -> Any:
    """One pass over the graph of the stacked tensors."""
    outputs, inputs = args
    if any(functorch.is_gradtrackingtensor(t) for t in outputs if isinstance(t, Tensor)):
        return NotImplemented  # what torch.func.vjp has returned asks for its own
    if any(isinstance(t, GradientEdge) for t in (*outputs, *inputs)):
        raise BatchingError("it takes derivatives at a GradientEdge")
    weights = kwargs.pop("grad_outputs")
    weights = [weights] * len(outputs) if weights is None or isinstance(weights, Tensor) else list(weights)
    if not any(t is not None and functorch.is_batchedtensor(t) for t in (*outputs, *inputs, *weights)):
        with temporarily_pop_interpreter_stack():
            return operator(outputs, inputs, weights, **kwargs)
    several, shared = kwargs["is_grads_batched"], list(map(_shared, inputs))
    stacks = [_stack(mode, t) for t in outputs]
    weights = [_weights(mode, *pair, several) for pair in zip(stacks, weights, strict=True)]
    own = [_in_memory(t) for t, whole in zip(inputs, shared, strict=True) if whole is None]
    dims = [0 if whole is not None else functorch.maybe_get_bdim(t) for t, whole in zip(inputs, shared, strict=True)]
    with temporarily_pop_interpreter_stack():
        found = _derivatives(operator, stacks, own, shared, weights, kwargs)
    pairs = zip(found, dims, strict=True)
    return tuple(None if g is None else functorch._add_batch_dim(g, several + dim, mode.level) for g, dim in pairs)


def _weights(mode: Pass, stack: Tensor, weights: Tensor | None, several: bool) -> Tensor:
    """Return the weights of the outputs `[M, ...]` in the derivatives; `[K, M, ...]` for K derivatives at once."""
    if weights is None:
        if stack[0].numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        return torch.ones_like(stack)
    rows = _stack(mode, weights)
    return rows.transpose(0, 1) if several else rows


def _derivatives(
    operator: Callable,
    stacks: list[Tensor],
    own: list[Tensor],
    shared: list[Tensor | None],
    weights: list[Tensor],
    options: dict,
) -> Sequence[Tensor | None]:
    """Return the derivatives with respect to the models' own tensors and, where it is not None, to a shared one.

    Raises:
        SharedInput: the outputs depend on a shared tensor by a way on which the models are not apart.
    """
    wholes = [t for t in shared if t is not None]
    edges = _layouts(stacks, wholes) if wholes and all(t.requires_grad for t in wholes) else {}
    if not edges:  # of shared ones torch says what is wrong, or that nothing depends on them
        remaining = iter(own)
        return operator(stacks, [next(remaining) if t is None else t for t in shared], weights, **options)
    if options["materialize_grads"]:
        raise SharedInput
    may_be_unused, options = options["allow_unused"], options | {"allow_unused": True}
    gradients = operator(stacks, [*own, *edges], weights, **options)
    of_rows = [(t, g) for t, g in zip(edges.values(), gradients[len(own) :], strict=True) if g is not None]
    of_own, of_shared = iter(gradients), iter([None for _ in wholes])
    if of_rows:
        laid_out, weights = zip(*of_rows, strict=True)
        options["is_grads_batched"], several = True, options["is_grads_batched"]
        led_back = operator(laid_out, wholes, [g.flatten(0, 1) if several else g for g in weights], **options)
        of_shared = (g.unflatten(0, (-1, len(stacks[0]))) if several and g is not None else g for g in led_back)
    found = [next(of_own if t is None else of_shared) for t in shared]
    if not may_be_unused and any(g is None for g in found):
        raise RuntimeError(_UNUSED)
    return found


def _layouts(stacks: Sequence[Tensor], shared: Sequence[Tensor]) -> dict[GradientEdge, Tensor]:
    """Return where the graph of some stacks lays out tensors of all models in rows, each place with its tensor."""
    ends = {get_gradient_edge(t)[:2] for t in shared}
    waiting = [get_gradient_edge(stack)[:2] for stack in stacks if stack.requires_grad]
    seen, found = set(), {}
    while waiting:
        node, number = waiting.pop()
        if (node, number) in ends:
            raise SharedInput
        if node is None or node in seen:
            continue
        seen.add(node)
        if SHARED in node.metadata:
            found[GradientEdge(node, 0)] = node.metadata[SHARED]
        else:
            waiting += node.next_functions
    return found


def _stack(mode: Pass, tensor: Tensor) -> Tensor:
    stack = as_stacked(tensor)
    return tensor.expand(mode.num_models, *tensor.shape) if stack is None else stack
