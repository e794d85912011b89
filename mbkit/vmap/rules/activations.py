"""PReLU: vmap's own rule leaves out a sum in the second derivative where all models share the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import RULES_INSIDE, Pass, rule
from ..unwrap import call_unwrapped, expanded


@rule(torch.prelu)
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
