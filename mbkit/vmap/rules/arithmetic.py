"""Sums and products of tensors with a number that differs between the models, such as a weight in the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..in_turn import model_by_model
from ..per_model import PerModel
from ..registry import Pass, rule
from ..unwrap import as_one_model_sees

_NAMES = ("add", "sub", "mul", "div", "true_divide", "__add__", "__sub__", "__mul__", "__truediv__", "__radd__")
_NAMES += ("__rsub__", "__rmul__")
_FUNCTIONS = [getattr(room, name) for room in (torch, Tensor) for name in _NAMES if hasattr(room, name)]


@rule(*_FUNCTIONS, per_model=True)
def _arithmetic(mode: Pass, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Take the numbers as one tensor of the other operand's type: they are rounded as torch rounds a Python number."""
    if not any(isinstance(value, PerModel) for value in (*args, *kwargs.values())):
        return NotImplemented
    like = next((value for value in args if isinstance(value, Tensor)), None)
    if kwargs or like is None or like.dtype not in (torch.float32, torch.float64):  # half types round elsewhere
        return model_by_model(mode, function, args, kwargs)

    def as_tensor(number: PerModel) -> Tensor:
        return as_one_model_sees(torch.tensor(number.values, dtype=like.dtype, device=like.device))

    return function(*(as_tensor(value) if isinstance(value, PerModel) else value for value in args))
