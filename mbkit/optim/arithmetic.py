"""torch.optim's operations with a tensor of M numbers in place of one number, to the same bits.

In torch.optim's for-loops a hyperparameter is a Python number, a double that a kernel rounds once; here it is a float64
column, rounded once by `Hyperparameters.spread`. Kernels that take a number but no tensor are written so that the bits
stay:

    x.add(y, alpha=a)              torch.addcmul(x, y, a)           x + a*y, fused either way
    x.addcmul_(y, y, value=a)      x.addcmul_(y * a, y)             (a*y)*y; y*y*a rounds differently
    x.addcdiv_(y, z, value=a)      x.addcdiv_(y * a, z)             (a*y)/z
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add", "add_", "choose", "lerp", "shift_"]


def choose(flag: bool | Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return `yes` where the flag is on and `no` elsewhere; without any work if it is one for all models."""
    if isinstance(flag, bool):
        return yes if flag else no
    return torch.where(flag, yes, no)


def add(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """Return x + a*y. torch's add, unlike the other kernels, rounds its number to x's dtype (think of bfloat16)."""
    return torch.addcmul(x, y, a.to(x.dtype))


def add_(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """Add a*y to x in place."""
    return x.addcmul_(y, a.to(x.dtype))


def shift_(x: Tensor, a: Tensor) -> Tensor:
    """Add a to x in place."""
    return x.add_(a.to(x.dtype))


def lerp(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Move x in place toward y. lerp, unlike the others, refuses a weight of another dtype (float32 for bfloat16)."""
    if x.dtype == weight.dtype:
        return x.lerp_(y, weight)
    return x.copy_(x.to(weight.dtype).lerp_(y.to(weight.dtype), weight))
