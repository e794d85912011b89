"""torch.optim's operations with a tensor of M numbers in place of one number, to the same bits.

In torch.optim's for-loops a hyperparameter is a Python number, a double that a kernel rounds once; here it is a float64
column, rounded once by `Hyperparameters.spread`. Kernels that take a number but no tensor are written so that the bits
stay:

    x.add(y, alpha=a)              torch.addcmul(x, y, a)           x + a*y, fused either way
    x.addcmul_(y, y, value=a)      x.addcmul_(y * a, y)             (a*y)*y; y*y*a rounds differently
    x.addcdiv_(y, z, value=a)      x.addcdiv_(y * a, z)             (a*y)/z
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hyperparameters import Hyperparameters

__all__ = [
    "States", "Tensors", "add", "add_", "ascend", "averages", "choose", "count", "decay", "lerp", "shift_",
]  # fmt: skip

Tensors = list[Tensor]
States = list[dict[str, Tensor]]


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


# ---------------------------------------------------------------------- what the rules share


def averages(h: Hyperparameters) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of running averages: 1 - beta1, beta2 and 1 - beta2, each `[M]`."""
    beta1, beta2 = h["betas"].unbind(-1)
    return 1 - beta1, beta2, 1 - beta2


def ascend(grads: Tensors, h: Hyperparameters) -> Tensors:
    """Turn the gradients around for the models that maximize."""
    if h.on("maximize") is False:
        return list(grads)
    (flags,) = h.once("maximize", lambda: [h.on("maximize")])
    return [choose(flag, -grad, grad) for flag, grad in zip(flags, grads, strict=True)]


def decay(params: Tensors, grads: Tensors, h: Hyperparameters, decoupled: bool | Tensor = False) -> Tensors:
    """Apply weight decay: to the gradient, or straight to the parameter for the models that decouple it."""
    coupled = h.on("weight_decay")
    if coupled is False:
        return grads
    if decoupled is not False:
        (factors,) = h.once("decoupled", lambda: [1 - h["lr"] * h["weight_decay"] * decoupled])
        for param, column in zip(params, factors, strict=True):
            param.mul_(column)
        if decoupled is True:
            return grads
        coupled = ~decoupled if coupled is True else coupled & ~decoupled
    flags, columns = h.once("coupled", lambda: (coupled, h["weight_decay"]))
    return [
        choose(flag, add(grad, param, column), grad)
        for flag, column, grad, param in zip(flags, columns, grads, params, strict=True)
    ]


def count(states: States, name: str, h: Hyperparameters, by: Any = 1) -> Tensor:
    """Advance the models' counts and return them as `[P, M]`, in the columns' dtype."""
    return torch.stack([state[name].add_(by) for state in states]).to(h["lr"].dtype)
