"""torch.optim's operations with a tensor of M numbers in place of one number, to the same bits.

In torch.optim's for-loops a hyperparameter is a Python number, a double that a kernel rounds once; here it is a float64
column, rounded once by `Hyperparameters.spread`. Kernels that take a number but no tensor are written so that the bits
stay:

    x.add(y, alpha=a)              torch.addcmul(x, y, a)           x + a*y, fused either way
    x.addcmul_(y, y, value=a)      x.addcmul_(y * a, y)             (a*y)*y; y*y*a rounds differently
    x.addcdiv_(y, z, value=a)      x.addcdiv_(y * a, z)             (a*y)/z
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from .each import Each
from .hyperparameters import Hyperparameters

States = list[dict[str, Tensor]]
Some = TypeVar("Some", Tensor, Each)


def choose(flag: bool | Some, yes: Some, no: Some) -> Some:
    """Return `yes` where the flag is on and `no` elsewhere; without any work if it is one for all models."""
    if isinstance(flag, bool):
        return yes if flag else no
    return yes.where(flag, no)


def add(x: Some, y: Some, a: Some) -> Some:
    """Return x + a*y. torch's add, unlike the other kernels, rounds its number to x's dtype (think of bfloat16)."""
    return x.addcmul(y, a.to(x.dtype))


def add_(x: Some, y: Some, a: Some) -> Some:
    """Add a*y to x in place."""
    return x.addcmul_(y, a.to(x.dtype))


def shift_(x: Some, a: Some) -> Some:
    """Add a to x in place."""
    return x.add_(a.to(x.dtype))


def lerp(x: Some, y: Some, weight: Some) -> Some:
    """Move x in place toward y. lerp, unlike the others, refuses a weight of another dtype (float32 for bfloat16)."""
    if x.dtype == weight.dtype:
        return x.lerp_(y, weight)
    return x.copy_(x.to(weight.dtype).lerp_(y.to(weight.dtype), weight))


# ---------------------------------------------------------------------- what the rules share


def kept(states: States, name: str) -> Each:
    """Return what is kept under a name for each parameter."""
    return Each(state[name] for state in states)


def averages(h: Hyperparameters) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of running averages: 1 - beta1, beta2 and 1 - beta2, each `[M]`."""
    beta1, beta2 = h["betas"].unbind(-1)
    return 1 - beta1, beta2, 1 - beta2


def ascend(grad: Each, h: Hyperparameters) -> Each:
    """Turn the gradients around for the models that maximize."""
    if h.on("maximize") is False:
        return grad
    (flag,) = h.once("maximize", lambda: [h.on("maximize")])
    return choose(flag, -grad, grad)


def decay(param: Each, grad: Each, h: Hyperparameters, decoupled: bool | Tensor = False) -> Each:
    """Apply weight decay: to the gradient, or straight to the parameter for the models that decouple it."""
    coupled = h.on("weight_decay")
    if coupled is False:
        return grad
    if decoupled is not False:
        (factor,) = h.once("decoupled", lambda: [1 - h["lr"] * h["weight_decay"] * decoupled])
        param.mul_(factor)
        if decoupled is True:
            return grad
        coupled = ~decoupled if coupled is True else coupled & ~decoupled
    flag, column = h.once("coupled", lambda: (coupled, h["weight_decay"]))
    return choose(flag, add(grad, param, column), grad)


def count(states: States, name: str, h: Hyperparameters, by: Tensor | None = None) -> Tensor:
    """Advance the models' counts, by 1 or by `[M]`, and return them as `[P, M]`, in the columns' dtype.

    On a CPU, where to look is cheaper than to go on with P rows, they are `[1, M]` if all parameters have the same.
    """
    counts = kept(states, name)
    by = h.kept("one", lambda: torch.ones_like(counts[0])) if by is None else by
    first, *others = counts.add_(Each([by] * len(counts)))
    alike = first.is_cpu and type(first) is Tensor and all(torch.equal(first, other) for other in others)
    return (first[None] if alike else torch.stack(counts)).to(h["lr"].dtype)
