"""Random operators: model m draws from its own stream the very bits that it draws when it is trained alone.

Most numbers depend on no others: only on a shape, an order in memory and the operator's settings. `Streams.fill` draws
those, before the step where the step is compiled. What depends on other numbers (by a rejection, by a sign) is drawn
model by model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..in_turn import model_by_model
from ..layout import has_gaps, row_alone
from ..per_model import PerModel
from ..registry import RULES_WITH_SETTINGS, Pass, rule
from ..unwrap import call_unwrapped
from .data_dependent import all_true

_IN_TURN = """alpha_dropout alpha_dropout_ binomial feature_alpha_dropout feature_alpha_dropout_
    native_dropout poisson rrelu rrelu_ _sample_dirichlet _standard_gamma"""
_ALIGNED = 64  # bytes, at least what a GPU's thread reads at once
_FILLS = "bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_"

rule(*(getattr(torch, name) for name in _IN_TURN.split() if hasattr(torch, name)))(model_by_model)
rule(torch._C._nn.rrelu_with_noise)(model_by_model)


def _fixed(*arguments: Any) -> bool:
    """Say whether arguments are what the streams can draw by: the same for all models, and without a generator."""
    return not any(isinstance(leaf, (Tensor, PerModel, torch.Generator)) for leaf in tree_leaves(arguments))


def _fill(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """A method that fills a tensor."""
    named = {name: value for name, value in kwargs.items() if name != "generator"}
    method = partial(operator, **named) if named else operator

    def run(stacks: list[Tensor], stacked: list[bool]) -> bool:
        if stacked[0]:
            stacks[0].copy_(mode.streams.fill(method, row_alone(mode, stacks[0], True), *args[1:]))
        return stacked[0]

    if not _fixed(args[1:], kwargs) or not call_unwrapped(mode, run, args[:1]):
        return model_by_model(mode, operator, args, kwargs)
    return args[0]


rule(*(getattr(Tensor, name) for name in _FILLS.split()))(_fill)


def _permute(row: Tensor, generator: Any) -> None:
    torch.randperm(len(row), generator=generator, out=row)


_NEW = {torch.rand: Tensor.uniform_, torch.randn: Tensor.normal_, torch.randint: Tensor.random_}
_NEW[torch.randperm] = _permute
_LIKE = {torch.rand_like: Tensor.uniform_, torch.randn_like: Tensor.normal_, torch.randint_like: Tensor.random_}


@rule(*_NEW, *_LIKE)
def _new(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """A function that returns a new tensor, perhaps one like another: it is made empty, and filled."""
    like, settings = (args[:1], args[1:]) if operator in _LIKE else ((), args)
    if not _fixed(settings, kwargs) or kwargs.keys() & {"out", "requires_grad"}:
        return model_by_model(mode, operator, args, kwargs)
    given = {name: value for name, value in kwargs.items() if value is not None}
    bounds, size = (), settings
    if operator in (torch.randint, torch.randint_like):
        ordered = [*settings, *(given.pop(name) for name in ("low", "high", "size") if name in given)]
        bounds, size = (ordered, []) if like else (ordered[:-1], ordered[-1:])
    if operator in (torch.randint, torch.randperm):
        given.setdefault("dtype", torch.int64)
    make, fill = (torch.empty_like, _LIKE[operator]) if like else (torch.empty, _NEW[operator])
    return _drawn(mode, fill, like, lambda *row: make(*row, *size, **given), *bounds)


def _drawn(mode: Pass, method: Callable, like: Sequence[Tensor], make: Callable, *settings: Any) -> Tensor:
    """Return a tensor that a method fills; `make` makes it, empty, from what one model has of `like`."""

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        return mode.streams.fill(method, make(*map(partial(row_alone, mode), stacks, stacked)), *settings)

    return call_unwrapped(mode, run, like)


# ------------------------------------------------------------------ numbers that depend on others, from such as do not


def _by_value(draw: Callable) -> Callable:
    """Return a rule; `draw` gets the pass and the operator's arguments, and returns NotImplemented where it cannot."""

    def rule(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
        tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
        tracked = call_unwrapped(mode, lambda stacks, _: any(stack.requires_grad for stack in stacks), tensors)
        # Numbers drawn by what autograd follows give it a gradient of zeros alone, and here none; indices do not alone.
        tracked = tracked and torch.is_grad_enabled() and draw.__name__ != "_multinomial"
        refused = tracked or kwargs.keys() & {"input", "p", "generator", "out", "requires_grad"}
        drawn = NotImplemented if refused else draw(mode, *args, **kwargs)
        return model_by_model(mode, operator, args, kwargs) if drawn is NotImplemented else drawn

    return rule


@rule(torch.normal)
@_by_value
def _normal(mode: Pass, mean: Any = 0.0, std: Any = 1.0, size: Any = None, **kind: Any) -> Any:
    """Standard normal numbers, scaled and moved."""
    tensors = [t for t in (mean, std) if isinstance(t, Tensor)]
    if not tensors:
        return _drawn(mode, Tensor.normal_, [], lambda: torch.empty(size, **kind), mean, std)
    shape, scaled = torch.broadcast_shapes(*(t.shape for t in tensors)), isinstance(std, Tensor)
    if scaled and not all_true(mode, std >= 0):
        return NotImplemented
    noise = _drawn(mode, Tensor.normal_, tensors[:1], lambda row: row.new_empty(shape), 0.0, 1.0 if scaled else std)
    return (noise * std if scaled else noise) + mean


@rule(torch.bernoulli, Tensor.bernoulli)
@_by_value
def _bernoulli(mode: Pass, p: Tensor, rate: float | None = None) -> Any:
    """Whether uniform numbers are below the probabilities, as a CPU draws it."""
    if rate is not None or mode.device.type != "cpu":
        return NotImplemented
    dtype = torch.promote_types(p.dtype, torch.float32)
    return (_drawn(mode, Tensor.uniform_, [p], lambda row: row.new_empty(row.shape, dtype=dtype)) < p).to(p.dtype)


@rule(torch.multinomial, Tensor.multinomial)
@_by_value
def _multinomial(mode: Pass, p: Tensor, num_samples: int, replacement: bool = False) -> Any:
    """The largest of the probabilities divided by exponential numbers, where nothing can be drawn twice."""
    is_valid = (p >= 0) & (p < torch.inf) & (p.sum(-1, keepdim=True) > 0)
    if (replacement and num_samples > 1) or num_samples > p.shape[-1] or not all_true(mode, is_valid):
        return NotImplemented
    scores = p / _drawn(mode, Tensor.exponential_, [p], torch.empty_like)
    return scores.argmax(-1, keepdim=True) if num_samples == 1 else scores.topk(num_samples).indices


# ------------------------------------------------------------------ dropout


@rule(torch.dropout, torch.feature_dropout, order=lambda input, p, train: ((input, p, train), {}))
@rule(torch.dropout, torch.feature_dropout, table=RULES_WITH_SETTINGS)
def _dropout(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """Dropout with one mask per model, of numbers or of whole features.

    On a CPU this draws what torch itself draws there, `bernoulli_(1 - p).div_(1 - p)` in the order of memory. On a GPU
    torch has a kernel of its own for numbers, which a step that is compiled calls for the masks. It draws others where
    the activation has gaps or begins between two vectors; that, and what is not compiled, goes model by model.
    """
    x, p, train = args
    rates = p.values if isinstance(p, PerModel) else [p] * mode.num_models
    if not train or not any(rates):
        return x  # as torch does
    if kwargs or not (mode.device.type == "cpu" or (mode.device.type == "cuda" and mode.traced)):
        return model_by_model(mode, operator, args, kwargs)
    features = (*x.shape[:2], *[1] * (x.dim() - 2))
    fused = mode.device.type == "cuda" and operator is torch.dropout

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        row = row_alone(mode, stacks[0], stacked[0] and operator is torch.dropout)
        begins_a_vector = row.storage_offset() * row.itemsize % _ALIGNED == 0
        if fused and (has_gaps(row) or not begins_a_vector):
            return NotImplemented
        like = torch.empty_like(row) if operator is torch.dropout else row.new_empty(features)
        return stacks[0] * mode.streams.dropout_masks(like, rates, fused)

    out = call_unwrapped(mode, run, [x])
    return model_by_model(mode, operator, args, kwargs) if out is NotImplemented else out


_IN_PLACE = {torch.dropout_: torch.dropout, torch.feature_dropout_: torch.feature_dropout}


@rule(*_IN_PLACE)
def _dropout_in_place(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    dropped = _dropout(mode, _IN_PLACE[operator], args, kwargs)
    return dropped if dropped is args[0] else args[0].copy_(dropped)


@rule(torch._C._nn.scaled_dot_product_attention)
def _attention(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """`scaled_dot_product_attention`: M models are M times the batch; with dropout, step by step as on a CPU alone."""
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
    tensors = query, key, value = [given.pop(name) for name in ("query", "key", "value")]
    rate, mask, causal = given.pop("dropout_p", 0.0), given.pop("attn_mask", None), given.pop("is_causal", False)
    if rate > 0 and (mode.device.type != "cpu" or query.dtype.itemsize < 4 or given.pop("enable_gqa", False)):
        return model_by_model(mode, operator, args, kwargs)
    if rate > 0:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -torch.inf).to(query.dtype)
        weights = torch._scaled_dot_product_attention_math(query, key, value[..., :0], mask, 0.0, causal, **given)[1]
        return _dropout(mode, torch.dropout, (weights, rate, True), {}) @ value
    if mask is not None or any(x.dim() != 4 for x in tensors):
        return NotImplemented

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        if not all(stacked):
            return NotImplemented
        rows = operator(*(x.flatten(0, 1) for x in stacks), is_causal=causal, **given)
        return rows.unflatten(0, (mode.num_models, -1))

    return call_unwrapped(mode, run, tensors)
