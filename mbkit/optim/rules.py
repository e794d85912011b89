"""Stacked update rules: what torch.optim does to one model's parameters, done to M models' at once, to the same bits.

Every rule is a function `rule(params, grads, states, h)` that works in place:

- params, grads: P real tensors `[M, ...]` of one dtype each; only parameters that have a gradient.
- states: P dicts of tensors, `[M, ...]` like the parameter, or `[M]` for a count.
- h: a `Hyperparameters`; `h["lr"]` is a float64 tensor `[M]`.

They follow the for-loop implementations of torch.optim (`_single_tensor_adam` and the like), by the operations of
`arithmetic.py`.

Where all models agree on a branch of the lone code (`weight_decay != 0`, nesterov, amsgrad …) it is a Python branch;
where they differ, both are computed and `torch.where` picks, also what is kept: a model's state does not depend on who
else is in the batch. No rule reads a tensor's value in Python, so all of them
can be compiled and never wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .arithmetic import add, add_, choose, lerp, shift_
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
        part, stay = torch.where(first, 1, 1 - h["dampening"]), h["momentum"]
        if uses is not True:
            part, stay = torch.where(uses, part, 0), torch.where(uses, stay, 1)
        fixed = h.once("momentum", lambda: (stay, h["momentum"], uses, h.on("nesterov")))
        for i, (keep, momentum, uses, nesterov, take) in enumerate(zip(*fixed, h.spread(part), strict=True)):
            grad, buffer = grads[i], states[i]["momentum_buffer"]
            add_(buffer.mul_(keep), grad, take)
            ahead = buffer if nesterov is False else add(grad, buffer, momentum)
            grads[i] = choose(uses, choose(nesterov, ahead, buffer), grad)
    (rates,) = h.once("rates", lambda: [-h["lr"]])
    for param, grad, lr in zip(params, grads, rates, strict=True):
        add_(param, grad, lr)


def adam(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adam, and AdamW, which is Adam with decoupled weight decay."""
    steps = _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h, h.on("decoupled_weight_decay"))
    correction1, correction2 = (1 - h["betas"].T.unsqueeze(1) ** steps).unbind(0)
    fixed = h.once("adam", lambda: (*_averages(h), h["eps"], h.on("amsgrad")))
    changing = map(h.spread, (correction2.sqrt(), -(h["lr"] / correction1)))
    for i, (take1, keep2, take2, eps, amsgrad, root, step_size) in enumerate(zip(*fixed, *changing, strict=True)):
        param, grad, state = params[i], grads[i], states[i]
        second = state["exp_avg_sq"]
        lerp(state["exp_avg"], grad, take1)
        second.mul_(keep2).addcmul_(grad * take2, grad)
        if amsgrad is not False:
            largest = state["max_exp_avg_sq"]
            largest.copy_(choose(amsgrad, torch.maximum(largest, second), largest))
            second = choose(amsgrad, largest, second)
        denominator = shift_((second.sqrt() / root).to(param.dtype), eps)
        param.addcdiv_(state["exp_avg"] * step_size, denominator)


def rmsprop(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.RMSprop."""
    _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h)
    flags = (h.on("centered"), h.on("momentum"))
    fixed = h.once("rmsprop", lambda: (h["alpha"], 1 - h["alpha"], h["eps"], h["momentum"], -h["lr"], *flags))
    for i, (keep, take, eps, momentum, lr, centered, uses) in enumerate(zip(*fixed, strict=True)):
        param, grad, state = params[i], grads[i], states[i]
        square = state["square_avg"].mul_(keep).addcmul_(grad * take, grad)
        if centered is not False:
            mean = state["grad_avg"]
            mean.copy_(choose(centered, lerp(mean.clone(), grad, take), mean))
            square = choose(centered, torch.addcmul(square, mean, mean, value=-1), square)
        root = shift_(square.sqrt(), eps)
        if uses is False:
            param.addcdiv_(grad * lr, root)
            continue
        buffer = state["momentum_buffer"]
        moved = (buffer if uses is True else buffer.clone()).mul_(momentum).addcdiv_(grad, root)
        if uses is True:
            add_(param, moved, lr)
        else:
            buffer.copy_(torch.where(uses, moved, buffer))
            param.copy_(torch.where(uses, add(param, moved, lr), torch.addcdiv(param, grad * lr, root)))


def adagrad(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adagrad."""
    steps = _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h)
    rates = h["lr"] / (1 + (steps - 1) * h["lr_decay"])
    for i, (eps, rate) in enumerate(zip(*h.once("adagrad", lambda: [h["eps"]]), h.spread(-rates), strict=True)):
        root = shift_(states[i]["sum"].addcmul_(grads[i], grads[i]).sqrt(), eps)
        params[i].addcdiv_(grads[i] * rate, root)


def adadelta(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adadelta."""
    _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h)
    fixed = h.once("adadelta", lambda: (h["rho"], 1 - h["rho"], h["eps"], -h["lr"]))
    for i, (keep, take, eps, lr) in enumerate(zip(*fixed, strict=True)):
        param, grad, squares, deltas = params[i], grads[i], states[i]["square_avg"], states[i]["acc_delta"]
        squares.mul_(keep).addcmul_(grad * take, grad)
        root = shift_(squares.clone(), eps).sqrt_()
        delta = shift_(deltas.clone(), eps).sqrt_().div_(root).mul_(grad)
        deltas.mul_(keep).addcmul_(delta * take, delta)
        add_(param, delta, lr)


def adamax(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adamax."""
    steps = _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h)
    rates = h.spread(-(h["lr"] / (1 - h["betas"][:, 0] ** steps)))
    fixed = h.once("adamax", lambda: (*_averages(h), h["eps"]))
    for i, (take, keep, _, eps, rate) in enumerate(zip(*fixed, rates, strict=True)):
        mean = lerp(states[i]["exp_avg"], grads[i], take)
        norm = states[i]["exp_inf"].mul_(keep)
        torch.maximum(norm, shift_(grads[i].abs(), eps), out=norm)
        params[i].addcdiv_(mean * rate, norm)


def nadam(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.NAdam, which keeps the product of its momenta in float32."""
    beta1, beta2 = h["betas"].unbind(-1)
    steps = _count(states, "step", h)
    grads = _decay(params, _ascend(grads, h), h, h.on("decoupled_weight_decay"))
    mu = beta1 * (1 - 0.5 * 0.96 ** (steps * h["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((steps + 1) * h["momentum_decay"]))
    kept = [state["mu_product"] for state in states]
    product = torch.stack([p.mul_(row.to(p.dtype)) for p, row in zip(kept, mu, strict=True)]).to(mu.dtype)
    rate, rate_next = -h["lr"] * (1 - mu) / (1 - product), -h["lr"] * mu_next / (1 - product * mu_next)
    fixed, changing = h.once("nadam", lambda: (*_averages(h), h["eps"])), (1 - beta2**steps, rate, rate_next)
    columns = zip(*fixed, *map(h.spread, changing), strict=True)
    for i, (take1, keep2, take2, eps, correction2, rate, rate_next) in enumerate(columns):
        param, grad, second = params[i], grads[i], states[i]["exp_avg_sq"]
        mean = lerp(states[i]["exp_avg"], grad, take1)
        second.mul_(keep2).addcmul_(grad * take2, grad)
        denominator = shift_((second / correction2).to(param.dtype).sqrt_(), eps)
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
    fixed = h.once("radam", lambda: (*_averages(h), h["eps"], h["lr"]))
    columns = zip(*fixed, *map(h.spread, (correction1, correction2.sqrt(), rectify, length > 5)), strict=True)
    for i, (take1, keep2, take2, eps, lr, bias1, root2, factor, long) in enumerate(columns):
        param, grad, second = params[i], grads[i], states[i]["exp_avg_sq"]
        mean = lerp(states[i]["exp_avg"], grad, take1)
        second.mul_(keep2).addcmul_(grad * take2, grad)
        step = ((mean / bias1).to(param.dtype) * lr).to(param.dtype)
        # torch divides a number by a tensor in two steps: number * (1 / tensor)
        adaptive = (shift_(second.sqrt(), eps).reciprocal_() * root2).to(param.dtype)
        rectified = ((step * adaptive) * factor).to(param.dtype)
        param.sub_(torch.where(long, rectified, step))


def muon(params: Tensors, grads: Tensors, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Muon: all models' matrices are made orthogonal at once, by batched products in bfloat16."""
    if params[0].dim() != 3:  # a complex one, seen as pairs of real numbers
        raise RuntimeError("Muon does not support complex parameters: train them by another optimizer.")
    (a, b, c), smallest = h.on("ns_coefficients"), h.on("eps")
    ratios = [_muon_ratio(h.flags["adjust_lr_fn"], *param.shape[1:]) for param in params]

    def columns() -> tuple[bool | Tensor, ...]:
        rates = torch.stack([-(h["lr"] * ratio) for ratio in ratios])
        return 1 - h["momentum"], h["momentum"], 1 - h["lr"] * h["weight_decay"], rates

    for i, (take, keep, factor, rate) in enumerate(zip(*h.once("muon", columns), strict=True)):
        param, grad, buffer = params[i], grads[i], states[i]["momentum_buffer"]
        lerp(buffer, grad, take)
        update = lerp(grad.clone(), buffer, keep) if h.on("nesterov") else buffer
        tall = param.shape[1] > param.shape[2]
        x = update.bfloat16().mT if tall else update.bfloat16()
        x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=smallest))
        for _ in range(h.on("ns_steps")):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        add_(param.mul_(factor), (x.mT if tall else x).to(param.dtype), rate)


def _muon_ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns)) if adjust_lr_fn in (None, "original") else 1.0


# ---------------------------------------------------------------------- what the rules share


def _averages(h: Hyperparameters) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of running averages: 1 - beta1, beta2 and 1 - beta2, each `[M]`."""
    beta1, beta2 = h["betas"].unbind(-1)
    return 1 - beta1, beta2, 1 - beta2


def _ascend(grads: Tensors, h: Hyperparameters) -> Tensors:
    """Turn the gradients around for the models that maximize."""
    if h.on("maximize") is False:
        return list(grads)
    (flags,) = h.once("maximize", lambda: [h.on("maximize")])
    return [choose(flag, -grad, grad) for flag, grad in zip(flags, grads, strict=True)]


def _decay(params: Tensors, grads: Tensors, h: Hyperparameters, decoupled: bool | Tensor = False) -> Tensors:
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


def _count(states: States, name: str, h: Hyperparameters, by: Any = 1) -> Tensor:
    """Advance the models' counts and return them as `[P, M]`, in the columns' dtype."""
    return torch.stack([state[name].add_(by) for state in states]).to(h["lr"].dtype)


@dataclass(frozen=True)
class Rule:
    """An update rule and the state that it keeps.

    Args:
        update: the function.
        counts: state `[M]`, with what it starts from.
        state: state `[M, ...]` like the parameter, zero at the start (Adagrad's sum has its own hyperparameter).
        optional: state that only some models need, with the hyperparameter that has to be on for it.
        common: hyperparameters that must be one value for all models; where they differ, models are updated in turn.
    """

    update: Callable[[Tensors, Tensors, States, Hyperparameters], None]
    counts: dict[str, float]
    state: tuple[str, ...]
    optional: dict[str, str] = field(default_factory=dict)
    common: tuple[str, ...] = ()

    def suits(self, configs: Sequence[Sequence[dict[str, Any]]]) -> bool:
        """Say whether M lists of G configs agree on what has to be common."""
        kinds = [[[config.get(name) for name in self.common] for config in own] for own in configs]
        return all(kind == kinds[0] for kind in kinds)


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
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    common = ("nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")
    RULES[torch.optim.Muon] = Rule(muon, {}, ("momentum_buffer",), common=common)
