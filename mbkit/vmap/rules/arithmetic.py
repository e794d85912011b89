"""Sums and products of tensors with a number that differs between the models, such as a weight in the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..per_model import PerModel
from ..registry import RULES_INSIDE, RULES_WITH_SETTINGS, Pass, rule
from ..unwrap import as_one_model_sees, below

_NAMES = """add sub mul div true_divide __add__ __sub__ __mul__ __truediv__ __radd__ __rsub__ __rmul__ addcmul addcdiv
    lerp add_ sub_ mul_ div_ addcmul_ addcdiv_ lerp_ __iadd__ __isub__ __imul__ __itruediv__""".split()
_FUNCTIONS = [getattr(room, name) for room in (torch, Tensor) for name in _NAMES if hasattr(room, name)]


@rule(*_FUNCTIONS, table=RULES_WITH_SETTINGS)
@rule(*_FUNCTIONS, table=RULES_INSIDE)
def _arithmetic(mode: Pass, operator: Callable, args: tuple, kwargs: dict) -> Any:
    """Take the numbers as one tensor of the other operand's type: they are rounded as torch rounds a Python number."""
    like = next((value for value in args if isinstance(value, Tensor)), None)
    if like is None or like.dtype not in (torch.float32, torch.float64):  # half types round elsewhere
        return NotImplemented
    if kwargs and any(isinstance(value, Tensor) and value.dtype != like.dtype for value in args):
        return NotImplemented

    def as_tensor(value: Any) -> Any:
        if not isinstance(value, PerModel):
            return value
        with below(mode):
            stack = torch.tensor(value.values, dtype=like.dtype, device=like.device)
        return as_one_model_sees(stack, mode.level)

    args, kwargs = tuple(map(as_tensor, args)), {name: as_tensor(value) for name, value in kwargs.items()}
    name, factors = operator.__name__, [kwargs.get("alpha"), kwargs.get("value")]
    if isinstance(factors[0], Tensor) and isinstance(args[-1], Tensor):  # x + a*y
        factor = factors[0] if name.startswith("add") else -factors[0]
        return (args[0].addcmul_ if name.endswith("_") else args[0].addcmul)(args[-1], factor)
    if isinstance(factors[1], Tensor) and len(args) == 3:  # (a*y)*z or (a*y)/z
        return operator(args[0], args[1] * factors[1], args[2])
    return operator(*args, **kwargs)
