"""Random operators: model m draws from its own stream the very bits that it draws when it is trained alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operator_loop import model_by_model
from ..per_model import PerModel
from ..registry import Pass
from ..unwrap import on_stacks
from .convolution import check_order

__all__ = ["RULES"]


def _dropout(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Any:
    """`torch.dropout` with one mask a model.

    On a CPU this draws what torch itself draws there, `bernoulli_(1 - p).div_(1 - p)` over the activation's
    memory order. Other devices use fused kernels with counters of their own, so they go model by model.
    """
    x, p, train = args
    rates = p.values if isinstance(p, PerModel) else [p] * mode.num_models
    if not train or not any(rates):
        return x  # as torch does
    if mode.device.type != "cpu" or kwargs:
        return model_by_model(mode, function, args, kwargs)

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        (x,) = stacks
        check_order(mode, stacks, stacked)
        return (x * mode.streams.dropout_masks(torch.empty_like(x[0] if stacked[0] else x), rates),)

    return on_stacks(run, mode.index, [x])[0]


_METHODS = "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal_ random_ uniform_"
_FUNCTIONS = """alpha_dropout alpha_dropout_ bernoulli binomial dropout_ feature_alpha_dropout feature_alpha_dropout_
    feature_dropout feature_dropout_ multinomial native_dropout normal poisson rand rand_like randint randint_like
    randn randn_like randperm rrelu rrelu_ _sample_dirichlet _standard_gamma"""

RULES = {getattr(torch.Tensor, name): model_by_model for name in _METHODS.split()}
RULES |= {getattr(torch, name): model_by_model for name in _FUNCTIONS.split() if hasattr(torch, name)}
RULES |= {torch.rrelu: model_by_model, torch._C._nn.rrelu_with_noise: model_by_model}
RULES[torch.dropout] = _dropout


def _rrelu_in_place(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Tensor:
    """`rrelu_` keeps its result for its backward, so the models cannot edit one stack in turn."""
    return args[0].copy_(model_by_model(mode, torch.rrelu, (args[0].clone(), *args[1:]), kwargs))


RULES[torch.rrelu_] = _rrelu_in_place


def _attention(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Any:
    """`scaled_dot_product_attention`: random only where it drops something; else M models are M times the batch."""
    rate = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if isinstance(rate, PerModel) or rate > 0:
        return model_by_model(mode, function, args, kwargs)
    if len(args) != 3 or kwargs.get("attn_mask") is not None or any(x.dim() != 4 for x in args):
        return function(*args, **kwargs)
    plan: list[bool] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        if not all(stacked):
            return (mode.index_values,)
        plan.append(True)
        return (function(*(x.flatten(0, 1) for x in stacks), **kwargs).unflatten(0, (mode.num_models, -1)),)

    out = on_stacks(run, mode.index, args)[0]
    return out if plan else function(*args, **kwargs)


RULES[torch._C._nn.scaled_dot_product_attention] = _attention
