"""Random operators: model m draws from its own stream the very bits that it draws when it is trained alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..in_turn import model_by_model
from ..layout import check_order
from ..per_model import PerModel
from ..registry import RULES_WITH_SETTINGS, Pass, rule
from ..unwrap import call_unwrapped

_METHODS = "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal_ random_ uniform_"
_FUNCTIONS = """alpha_dropout alpha_dropout_ bernoulli binomial dropout_ feature_alpha_dropout feature_alpha_dropout_
    feature_dropout feature_dropout_ multinomial native_dropout normal poisson rand rand_like randint randint_like
    randn randn_like randperm rrelu rrelu_ _sample_dirichlet _standard_gamma"""

rule(*(getattr(Tensor, name) for name in _METHODS.split()))(model_by_model)
rule(*(getattr(torch, name) for name in _FUNCTIONS.split() if hasattr(torch, name)))(model_by_model)
rule(torch._C._nn.rrelu_with_noise)(model_by_model)


@rule(torch.dropout)
@rule(torch.dropout, table=RULES_WITH_SETTINGS)
def _dropout(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """`torch.dropout` with one mask per model.

    On a CPU this draws what torch itself draws there, `bernoulli_(1 - p).div_(1 - p)` over the activation's
    memory order. Other devices use fused kernels with counters of their own, so they go model by model.
    """
    x, p, train = args
    rates = p.values if isinstance(p, PerModel) else [p] * mode.num_models
    if not train or not any(rates):
        return x  # as torch does
    if mode.device.type != "cpu" or kwargs:
        return model_by_model(mode, operator, args, kwargs)

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        check_order(mode, stacks, stacked)
        like = torch.empty_like(stacks[0][0] if stacked[0] else stacks[0])
        return stacks[0] * mode.streams.dropout_masks(like, rates)

    return call_unwrapped(mode, run, [x])


@rule(torch._C._nn.scaled_dot_product_attention)
def _attention(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """`scaled_dot_product_attention`: random only where it drops something; else M models are M times the batch."""
    rate = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if isinstance(rate, PerModel) or rate > 0:
        return model_by_model(mode, operator, args, kwargs)
    if len(args) != 3 or kwargs.get("attn_mask") is not None or any(x.dim() != 4 for x in args):
        return NotImplemented

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        if not all(stacked):
            return NotImplemented
        return operator(*(x.flatten(0, 1) for x in stacks), **kwargs).unflatten(0, (mode.num_models, -1))

    return call_unwrapped(mode, run, args)
