"""Stacked update rules: what torch.optim does to one model's parameters, done to M models' at once, to the same bits.

Every rule is a function `rule(params, grads, states, h)` that works in place:

- params, grads: P real tensors `[M, ...]` of one dtype each; only parameters that have a gradient.
- states: P dicts of tensors, `[M, ...]` like the parameter, or `[M]` for a count.
- h: a `Hyperparameters`; `h["lr"]` is a float64 tensor `[M]`.

They follow the for-loop implementations of torch.optim (`_single_tensor_adam` and the like). There a hyperparameter is
a Python number, a double that a kernel rounds once; here it is a float64 column, rounded once by `h.spread`. Kernels
that take a number but no tensor are written so that the bits stay:

    x.add(y, alpha=a)              torch.addcmul(x, y, a)           x + a*y, fused either way
    x.addcmul_(y, y, value=a)      x.addcmul_(y * a, y)             (a*y)*y; y*y*a rounds differently
    x.addcdiv_(y, z, value=a)      x.addcdiv_(y * a, z)             (a*y)/z

Where all models agree on a branch of the lone code (`weight_decay != 0`, nesterov, amsgrad …) it is a Python branch;
where they differ, both are computed and `torch.where` picks, also what is kept: a model's state does not depend on who
else is in the batch. No rule reads a tensor's value in Python, so all of them
can be compiled and never wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .hyperparameters import Hyperparameters

__all__ = ["RULES", "Rule"]

Tensors = list[Tensor]
States = list[dict[str, Tensor]]


def sgd(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.SGD. `momentum_steps` counts a model's steps with momentum: its first one fills the buffer."""
    grads = _decay(params, _ascend(grads, h), h)
    uses = h.on("momentum")
    if uses is not False:
        # The first momentum is the gradient itself, undampened; the buffer is zero until then. A model without
        # momentum keeps its buffer as it is: 1 * buffer + 0 * gradient.
        first = _count(states, "momentum_steps", h, by=h["momentum"] != 0) == 1
        keep, take = h["momentum"], torch.where(first, 1, 1 - h["dampening"])
        if uses is not True:
            keep, take = torch.where(uses, keep, 1), torch.where(uses, take, 0)
        columns = zip(h.spread(keep), h.spread(take), h.spread(h["momentum"]), strict=True)
        uses, nesterov = h.spread(uses), h.spread(h.on("nesterov"))
        for i, (keep, take, momentum) in enumerate(columns):
            grad, buffer = grads[i], states[i]["momentum_buffer"]
            _add_(buffer.mul_(keep), grad, take)
            ahead = buffer if nesterov[i] is False else _add(grad, buffer, momentum)
            grads[i] = _choose(uses[i], _choose(nesterov[i], ahead, buffer), grad)
    for param, grad, lr in zip(params, grads, h.spread(-h["lr"]), strict=True):
        _add_(param, grad, lr)


def adam(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adam, and AdamW, which is Adam with decoupled weight decay."""
    steps = _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h, h.on("decoupled_weight_decay"))
    correction1, correction2 = (1 - h["betas"].T.unsqueeze(1) ** steps).unbind(0)
    amsgrad = h.spread(h.on("amsgrad"))
    beta1, beta2 = h["betas"].unbind(-1)
    columns = (1 - beta1, beta2, 1 - beta2, h["eps"], correction2.sqrt(), -(h["lr"] / correction1))
    for i, (take1, keep2, take2, eps, root, step_size) in enumerate(zip(*map(h.spread, columns), strict=True)):
        param, grad, state = params[i], grads[i], states[i]
        second = state["exp_avg_sq"]
        _lerp(state["exp_avg"], grad, take1)
        second.mul_(keep2).addcmul_(grad * take2, grad)
        if amsgrad[i] is not False:
            largest = state["max_exp_avg_sq"]
            largest.copy_(_choose(amsgrad[i], torch.maximum(largest, second), largest))
            second = _choose(amsgrad[i], largest, second)
        denominator = _shift_((second.sqrt() / root).to(param.dtype), eps)
        param.addcdiv_(state["exp_avg"] * step_size, denominator)


def rmsprop(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.RMSprop."""
    _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h)
    centered, uses = h.spread(h.on("centered")), h.spread(h.on("momentum"))
    columns = (h["alpha"], 1 - h["alpha"], h["eps"], h["momentum"], -h["lr"])
    for i, (keep, take, eps, momentum, lr) in enumerate(zip(*map(h.spread, columns), strict=True)):
        param, grad, state = params[i], grads[i], states[i]
        square = state["square_avg"].mul_(keep).addcmul_(grad * take, grad)
        if centered[i] is not False:
            mean = state["grad_avg"]
            mean.copy_(_choose(centered[i], _lerp(mean.clone(), grad, take), mean))
            square = _choose(centered[i], torch.addcmul(square, mean, mean, value=-1), square)
        root = _shift_(square.sqrt(), eps)
        if uses[i] is False:
            param.addcdiv_(grad * lr, root)
            continue
        buffer = state["momentum_buffer"]
        moved = (buffer if uses[i] is True else buffer.clone()).mul_(momentum).addcdiv_(grad, root)
        if uses[i] is True:
            _add_(param, moved, lr)
        else:
            buffer.copy_(torch.where(uses[i], moved, buffer))
            param.copy_(torch.where(uses[i], _add(param, moved, lr), torch.addcdiv(param, grad * lr, root)))


def adagrad(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adagrad."""
    steps = _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h)
    rates = h["lr"] / (1 + (steps - 1) * h["lr_decay"])
    for i, (eps, rate) in enumerate(zip(h.spread(h["eps"]), h.spread(-rates), strict=True)):
        root = _shift_(states[i]["sum"].addcmul_(grads[i], grads[i]).sqrt(), eps)
        params[i].addcdiv_(grads[i] * rate, root)


def adadelta(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adadelta."""
    _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h)
    columns = (h["rho"], 1 - h["rho"], h["eps"], -h["lr"])
    for i, (keep, take, eps, lr) in enumerate(zip(*map(h.spread, columns), strict=True)):
        param, grad, squares, deltas = params[i], grads[i], states[i]["square_avg"], states[i]["acc_delta"]
        squares.mul_(keep).addcmul_(grad * take, grad)
        root = _shift_(squares.clone(), eps).sqrt_()
        delta = _shift_(deltas.clone(), eps).sqrt_().div_(root).mul_(grad)
        deltas.mul_(keep).addcmul_(delta * take, delta)
        _add_(param, delta, lr)


def adamax(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adamax."""
    beta1, beta2 = h["betas"].unbind(-1)
    steps = _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h)
    columns = (1 - beta1, beta2, h["eps"], -(h["lr"] / (1 - beta1**steps)))
    for i, (take, keep, eps, rate) in enumerate(zip(*map(h.spread, columns), strict=True)):
        mean = _lerp(states[i]["exp_avg"], grads[i], take)
        norm = states[i]["exp_inf"].mul_(keep)
        torch.maximum(norm, _shift_(grads[i].abs(), eps), out=norm)
        params[i].addcdiv_(mean * rate, norm)


def nadam(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.NAdam, which keeps the product of its momenta in float32."""
    beta1, beta2 = h["betas"].unbind(-1)
    steps = _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h, h.on("decoupled_weight_decay"))
    mu = beta1 * (1 - 0.5 * 0.96 ** (steps * h["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((steps + 1) * h["momentum_decay"]))
    product = _multiply(states, "mu_product", h, by=mu)
    rate, rate_next = -h["lr"] * (1 - mu) / (1 - product), -h["lr"] * mu_next / (1 - product * mu_next)
    columns = (1 - beta1, beta2, 1 - beta2, 1 - beta2**steps, h["eps"], rate, rate_next)
    for i, (take1, keep2, take2, correction2, eps, rate, rate_next) in enumerate(
        zip(*map(h.spread, columns), strict=True)
    ):
        param, grad, second = params[i], grads[i], states[i]["exp_avg_sq"]
        mean = _lerp(states[i]["exp_avg"], grad, take1)
        second.mul_(keep2).addcmul_(grad * take2, grad)
        denominator = _shift_((second / correction2).to(param.dtype).sqrt_(), eps)
        param.addcdiv_(grad * rate, denominator).addcdiv_(mean * rate_next, denominator)


def radam(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.RAdam. Models whose average is still too short to be rectified take the plain step."""
    beta1, beta2 = h["betas"].unbind(-1)
    steps = _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h, h.on("decoupled_weight_decay"))
    correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * steps * beta2**steps / correction2
    rectify = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)).sqrt()
    columns = (1 - beta1, beta2, 1 - beta2, correction1, h["lr"], correction2.sqrt(), h["eps"], rectify, length > 5)
    for i, (take1, keep2, take2, bias1, lr, root2, eps, factor, long) in enumerate(
        zip(*map(h.spread, columns), strict=True)
    ):
        param, grad, second = params[i], grads[i], states[i]["exp_avg_sq"]
        mean = _lerp(states[i]["exp_avg"], grad, take1)
        second.mul_(keep2).addcmul_(grad * take2, grad)
        step = ((mean / bias1).to(param.dtype) * lr).to(param.dtype)
        # torch divides a number by a tensor in two steps: number * (1 / tensor)
        adaptive = (_shift_(second.sqrt(), eps).reciprocal_() * root2).to(param.dtype)
        rectified = ((step * adaptive) * factor).to(param.dtype)
        param.sub_(torch.where(long, rectified, step))


# ---------------------------------------------------------------------- what the rules share


def _ascend(grads: Tensors, h: Hyperparameters) -> Tensors:
    """Turn the gradients around for the models that maximize."""
    flags = h.on("maximize")
    if flags is False:
        return list(grads)
    return [_choose(flag, -grad, grad) for flag, grad in zip(h.spread(flags), grads, strict=True)]


def _decay(params: Tensors, grads: Tensors, h: Hyperparameters, decoupled: bool | Tensor = False) -> Tensors:
    """Apply weight decay: to the gradient, or straight to the parameter for the models that decouple it."""
    coupled = h.on("weight_decay")
    if coupled is False:
        return grads
    if decoupled is not False:
        factor = 1 - h["lr"] * h["weight_decay"]
        for param, column in zip(params, h.spread(_choose(decoupled, factor, torch.ones_like(factor))), strict=True):
            param.mul_(column)
        if decoupled is True:
            return grads
        coupled = ~decoupled if coupled is True else coupled & ~decoupled
    flags, columns = h.spread(coupled), h.spread(h["weight_decay"])
    return [
        _choose(flag, _add(grad, param, column), grad)
        for flag, column, grad, param in zip(flags, columns, grads, params, strict=True)
    ]


def _count(states: States, name: str, h: Hyperparameters, by: Any = 1) -> Tensor:
    """Advance the models' counts and return them as `[P, M]`, in the columns' dtype."""
    return torch.stack([state[name].add_(by) for state in states]).to(h["lr"].dtype)


def _multiply(states: States, name: str, h: Hyperparameters, by: Tensor) -> Tensor:
    """Multiply the models' products by `[P, M]` and return them likewise."""
    products = [state[name].mul_(row.to(state[name].dtype)) for state, row in zip(states, by.unbind(0), strict=True)]
    return torch.stack(products).to(h["lr"].dtype)


def _choose(flag: bool | Tensor, yes: Tensor, no: Tensor) -> Tensor:
    if isinstance(flag, bool):
        return yes if flag else no
    return torch.where(flag, yes, no)


def _add(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """Return x + a*y. torch's add, unlike the other kernels, rounds its number to x's dtype (think of bfloat16)."""
    return torch.addcmul(x, y, a.to(x.dtype))


def _add_(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """Add a*y to x in place."""
    return x.addcmul_(y, a.to(x.dtype))


def _shift_(x: Tensor, a: Tensor) -> Tensor:
    """Add a to x in place."""
    return x.add_(a.to(x.dtype))


def _lerp(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Move x in place toward y. lerp, unlike the others, refuses a weight of another dtype (float32 for bfloat16)."""
    if x.dtype == weight.dtype:
        return x.lerp_(y, weight)
    return x.copy_(x.to(weight.dtype).lerp_(y.to(weight.dtype), weight))


@dataclass(frozen=True)
class Rule:
    """An update rule and the state that it keeps.

    Args:
        update: the function.
        counts: state `[M]`, with what it starts from.
        state: state `[M, ...]` like the parameter, zero at the start (Adagrad's sum has its own hyperparameter).
        optional: state that only some models need, with the hyperparameter that has to be on for it.
    """

    update: Callable[[Tensors, Tensors, States, Hyperparameters], None]
    counts: dict[str, float]
    state: tuple[str, ...]
    optional: dict[str, str] = field(default_factory=dict)


_STEP = {"step": 0.0}
_ADAM = ("exp_avg", "exp_avg_sq")
_AMSGRAD = {"max_exp_avg_sq": "amsgrad"}

# The classes with a stacked rule. A subclass is not taken for its parent: it may have a step of its own.
RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: Rule(sgd, {"momentum_steps": 0.0}, (), {"momentum_buffer": "momentum"}),
    torch.optim.Adam: Rule(adam, _STEP, _ADAM, _AMSGRAD),
    torch.optim.AdamW: Rule(adam, _STEP, _ADAM, _AMSGRAD),
    torch.optim.RMSprop: Rule(rmsprop, _STEP, ("square_avg",), {"momentum_buffer": "momentum", "grad_avg": "centered"}),
    torch.optim.Adagrad: Rule(adagrad, _STEP, ("sum",)),
    torch.optim.Adadelta: Rule(adadelta, _STEP, ("square_avg", "acc_delta")),
    torch.optim.Adamax: Rule(adamax, _STEP, ("exp_avg", "exp_inf")),
    torch.optim.NAdam: Rule(nadam, {"step": 0.0, "mu_product": 1.0}, _ADAM),
    torch.optim.RAdam: Rule(radam, _STEP, _ADAM),
}
