"""Arithmetic with a number that differs between the models: one operator for all of them, not M."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..per_model import PerModel
from ..registry import Pass
from ..unwrap import call_unwrapped

__all__ = ["with_numbers"]

_METHODS = (Tensor.add, Tensor.mul, Tensor.sub, Tensor.div, Tensor.__rsub__, Tensor.__rdiv__)
_ARITHMETIC = {*_METHODS, torch.add, torch.mul, torch.sub, torch.div}


def with_numbers(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """Let the M numbers be one of the tensors, in whose dtype torch computes with a Python number as well.

    It does not for dtypes of 16 bits, which it widens, nor for whole numbers, which become others.
    """
    dtypes = [arg.dtype for arg in args if isinstance(arg, Tensor)]
    if operator not in _ARITHMETIC or kwargs or len(args) != 2 or dtypes[0] not in (torch.float32, torch.float64):
        return NotImplemented

    def own(arg: Any) -> Any:
        if not isinstance(arg, PerModel):
            return arg
        numbers = torch.tensor(arg.values, dtype=dtypes[0], device=mode.device)
        return call_unwrapped(mode, lambda *_: numbers, [])

    return operator(*map(own, args))
