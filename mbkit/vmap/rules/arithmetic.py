"""Sums and products of tensors with a number that differs between the models, such as a weight in the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..per_model import PerModel
from ..registry import RULES_INSIDE, RULES_WITH_SETTINGS, Pass, rule
from ..unwrap import as_one_model_sees, below

_NAMES = ("add", "sub", "mul", "div", "true_divide", "__add__", "__sub__", "__mul__", "__truediv__", "__radd__")
_NAMES += ("__rsub__", "__rmul__")
_FUNCTIONS = [getattr(room, name) for room in (torch, Tensor) for name in _NAMES if hasattr(room, name)]


@rule(*_FUNCTIONS, table=RULES_WITH_SETTINGS)
@rule(*_FUNCTIONS, table=RULES_INSIDE)
def _arithmetic(mode: Pass, operator: Callable, args: tuple, kwargs: dict) -> Any:
    """Take the numbers as one tensor of the other operand's type: they are rounded as torch rounds a Python number."""
    like = next((value for value in args if isinstance(value, Tensor)), None)
    if kwargs or like is None or like.dtype not in (torch.float32, torch.float64):  # half types round elsewhere
        return NotImplemented

    def as_tensor(number: PerModel) -> Tensor:
        with below(mode):
            stack = torch.tensor(number.values, dtype=like.dtype, device=like.device)
        return as_one_model_sees(stack, mode.level)

    return operator(*(as_tensor(value) if isinstance(value, PerModel) else value for value in args))
