"""Normalisations and PReLU: vmap's own rules lose a part of the second derivatives, without a word.

The gradient of a normalisation's weight depends on the mean and the deviation of what is normalised, which they take
for constants, inside torch.func. PReLU's leaves out a sum where all models share the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BatchingError
from ..registry import RULES_INSIDE, Pass, rule
from ..unwrap import call_unwrapped, expanded


@rule(torch.layer_norm, torch.batch_norm, torch.instance_norm, table=RULES_INSIDE)
def _normalization(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """Leave them to the models one after the other: alone, torch loses some as well, for torch.func.jvp."""
    weight, by_its_input = (args[2], True) if operator is torch.layer_norm else (args[1], args[5])
    if weight is not None and by_its_input:
        raise BatchingError("torch.vmap takes wrong derivatives of a normalisation's weight inside torch.func")
    return NotImplemented


@rule(torch.prelu, order=lambda input, weight: ((input, weight), {}))
def _prelu(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """A shared input is laid out for each model, without a copy."""
    x, *rest = args
    return operator(*call_unwrapped(mode, lambda *x: tuple(expanded(mode, *x)), [x]), *rest, **kwargs)


@rule(torch.prelu, table=RULES_INSIDE)
def _prelu_inside(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """The same in operators that vmap has right rules for."""
    x, weight = args
    if weight.numel() > 1 and x.dim() > 1:
        weight = weight.view(-1, *[1] * (x.dim() - 2))
    return torch.where(x > 0, x, weight * x)
