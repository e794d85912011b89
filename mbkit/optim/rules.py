"""Stacked update rules: what torch.optim does to one model's parameters, done to M models' at once, to the same bits.

Every rule is a function `rule(param, grad, states, h)` that works in place:

- param, grad: P real tensors `[M, ...]` of one dtype, as an `Each`; only parameters that have a gradient.
- states: P dicts of tensors, `[M, ...]` like the parameter, or `[M]` for a count.
- h: a `Hyperparameters`; `h["lr"]` is a float64 tensor `[M]`.

They follow the for-loop implementations of torch.optim (`_single_tensor_adam` and the like), by the operations of
`arithmetic.py`.

Where all models agree on a branch of the lone code (`weight_decay != 0`, nesterov, amsgrad …) it is a Python branch;
where they differ, both are computed and `torch.where` picks, also what is kept: a model's state does not depend on who
else is in the batch. No rule reads a tensor's value in Python while it is compiled or on an accelerator, for which it
would wait.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from .arithmetic import States, add, add_, ascend, averages, choose, count, decay, kept, lerp, shift_
from .each import Each
from .hyperparameters import SWITCHES, Hyperparameters
from .matrix_rules import adafactor, factors, muon


def sgd(param: Each, grad: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.SGD. `momentum_steps` counts a model's steps with momentum: its first one fills the buffer."""
    grad = decay(param, ascend(grad, h), h)
    uses = h.on("momentum")
    if uses is not False:
        # The first momentum is the gradient itself, undampened; the buffer is zero until then. A model without
        # momentum keeps its buffer as it is: 1 * buffer + 0 * gradient.
        first = count(states, "momentum_steps", h, by=h["momentum"] != 0) == 1
        part, stay = torch.where(first, 1, 1 - h["dampening"]), h["momentum"]
        if uses is not True:
            part, stay = torch.where(uses, part, 0), torch.where(uses, stay, 1)
        keep, momentum, uses, nesterov = h.once("momentum", lambda: (stay, h["momentum"], uses, h.on("nesterov")))
        buffer = kept(states, "momentum_buffer")
        add_(buffer.mul_(keep), grad, h.spread(part))
        ahead = buffer if nesterov is False else add(grad, buffer, momentum)
        grad = choose(uses, choose(nesterov, ahead, buffer), grad)
    add_(param, grad, *h.once("rate", lambda: [-h["lr"]]))


def adam(param: Each, grad: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adam, and AdamW, which is Adam with decoupled weight decay."""
    steps = count(states, "step", h)
    grad = decay(param, ascend(grad, h), h, h.on("decoupled_weight_decay"))
    bases, fall = h.kept("adam", lambda: (h["betas"].T.unsqueeze(1), -h["lr"]))
    correction1, correction2 = torch.rsub(bases.pow(steps), 1).unbind(0)
    take1, keep2, take2, eps, amsgrad = h.once("adam's", lambda: (*averages(h), h["eps"], h.on("amsgrad")))
    root, step_size = map(h.spread, (correction2.sqrt(), fall / correction1))
    mean, second = kept(states, "exp_avg"), kept(states, "exp_avg_sq")
    lerp(mean, grad, take1)
    second.mul_(keep2).addcmul_(grad * take2, grad)
    if amsgrad is not False:
        largest = kept(states, "max_exp_avg_sq")
        largest.copy_(choose(amsgrad, largest.maximum(second), largest))
        second = choose(amsgrad, largest, second)
    denominator = shift_(second.sqrt().div_(root), eps)
    param.addcdiv_(mean * step_size, denominator)


def rmsprop(param: Each, grad: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.RMSprop."""
    count(states, "step", h)
    grad = decay(param, ascend(grad, h), h)
    flags = (h.on("centered"), h.on("momentum"))
    fixed = h.once("rmsprop", lambda: (h["alpha"], 1 - h["alpha"], h["eps"], h["momentum"], -h["lr"], *flags))
    keep, take, eps, momentum, lr, centered, uses = fixed
    square = kept(states, "square_avg").mul_(keep).addcmul_(grad * take, grad)
    if centered is not False:
        mean = kept(states, "grad_avg")
        mean.copy_(choose(centered, lerp(mean.clone(), grad, take), mean))
        square = choose(centered, square.addcmul(-mean, mean), square)
    root = shift_(square.sqrt(), eps)
    if uses is False:
        param.addcdiv_(grad * lr, root)
        return
    buffer = kept(states, "momentum_buffer")
    moved = (buffer if uses is True else buffer.clone()).mul_(momentum).addcdiv_(grad, root)
    if uses is True:
        add_(param, moved, lr)
    else:
        buffer.copy_(choose(uses, moved, buffer))
        param.copy_(choose(uses, add(param, moved, lr), param.clone().addcdiv_(grad * lr, root)))


def adagrad(param: Each, grad: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adagrad."""
    steps = count(states, "step", h)
    grad = decay(param, ascend(grad, h), h)
    rate = h.spread(-(h["lr"] / (1 + (steps - 1) * h["lr_decay"])))
    root = shift_(kept(states, "sum").addcmul_(grad, grad).sqrt(), *h.once("adagrad", lambda: [h["eps"]]))
    param.addcdiv_(grad * rate, root)


def adadelta(param: Each, grad: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adadelta."""
    count(states, "step", h)
    grad = decay(param, ascend(grad, h), h)
    keep, take, eps, lr = h.once("adadelta", lambda: (h["rho"], 1 - h["rho"], h["eps"], -h["lr"]))
    squares, deltas = kept(states, "square_avg"), kept(states, "acc_delta")
    squares.mul_(keep).addcmul_(grad * take, grad)
    root = shift_(squares.clone(), eps).sqrt_()
    delta = shift_(deltas.clone(), eps).sqrt_().div_(root).mul_(grad)
    deltas.mul_(keep).addcmul_(delta * take, delta)
    add_(param, delta, lr)


def adamax(param: Each, grad: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adamax."""
    steps = count(states, "step", h)
    grad = decay(param, ascend(grad, h), h)
    rate = h.spread(-(h["lr"] / (1 - h["betas"][:, 0] ** steps)))
    take, keep, _, eps = h.once("adamax", lambda: (*averages(h), h["eps"]))
    mean = lerp(kept(states, "exp_avg"), grad, take)
    norm = kept(states, "exp_inf").mul_(keep)
    norm.copy_(norm.maximum(shift_(grad.abs(), eps)))
    param.addcdiv_(mean * rate, norm)


def nadam(param: Each, grad: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.NAdam, which keeps the product of its momenta in float32."""
    beta1, beta2 = h["betas"].unbind(-1)
    steps = count(states, "step", h)
    grad = decay(param, ascend(grad, h), h, h.on("decoupled_weight_decay"))
    mu = beta1 * (1 - 0.5 * 0.96 ** (steps * h["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((steps + 1) * h["momentum_decay"]))
    product = kept(states, "mu_product")
    product = torch.stack(product.mul_(Each(mu.expand(len(product), -1)).to(product.dtype))).to(mu.dtype)
    rate, rate_next = -h["lr"] * (1 - mu) / (1 - product), -h["lr"] * mu_next / (1 - product * mu_next)
    take1, keep2, take2, eps = h.once("nadam", lambda: (*averages(h), h["eps"]))
    correction2, rate, rate_next = map(h.spread, (1 - beta2**steps, rate, rate_next))
    mean = lerp(kept(states, "exp_avg"), grad, take1)
    second = kept(states, "exp_avg_sq").mul_(keep2).addcmul_(grad * take2, grad)
    denominator = shift_((second / correction2).to(param.dtype).sqrt_(), eps)
    param.addcdiv_(grad * rate, denominator).addcdiv_(mean * rate_next, denominator)


def radam(param: Each, grad: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.RAdam. Models whose average is still too short to be rectified take the plain step."""
    beta1, beta2 = h["betas"].unbind(-1)
    steps = count(states, "step", h)
    grad = decay(param, ascend(grad, h), h, h.on("decoupled_weight_decay"))
    correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * steps * beta2**steps / correction2
    rectify = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)).sqrt()
    take1, keep2, take2, eps, lr = h.once("radam", lambda: (*averages(h), h["eps"], h["lr"]))
    bias1, root2, factor, long = map(h.spread, (correction1, correction2.sqrt(), rectify, length > 5))
    mean = lerp(kept(states, "exp_avg"), grad, take1)
    second = kept(states, "exp_avg_sq").mul_(keep2).addcmul_(grad * take2, grad)
    step = (mean / bias1).to(param.dtype).mul_(lr)
    # torch divides a number by a tensor in two steps: number * (1 / tensor)
    adaptive = shift_(second.sqrt(), eps).reciprocal_().mul_(root2)
    rectified = (step * adaptive).mul_(factor)
    param.sub_(choose(long, rectified, step))


@dataclass(frozen=True)
class Rule:
    """An update rule and the state that it keeps.

    Args:
        update: the function.
        counts: state `[M]`, with what it starts from.
        state: state `[M, ...]`, zero at the start (Adagrad's sum has its own hyperparameter): names, where it has the
            parameter's shape, or a function of a lone parameter's shape that returns the shapes by name.
        optional: state that only some models need, with the hyperparameter that has to be on for it.
        common: hyperparameters that must be one value for all models; where they differ, models are updated in turn.
        with_none: hyperparameters that are tuples in which None may stand, which the rule sees as NaN.
        real_only: whether the class refuses complex parameters.
    """

    update: Callable[[Each, Each, States, Hyperparameters], None]
    counts: dict[str, float]
    state: tuple[str, ...] | Callable[[torch.Size], dict[str, torch.Size]]
    optional: dict[str, str] = field(default_factory=dict)
    common: tuple[str, ...] = ()
    with_none: tuple[str, ...] = ()
    real_only: bool = False

    def shapes(self, shape: torch.Size) -> dict[str, torch.Size]:
        """Return the names and shapes of the state that every lone parameter of this shape has, counts aside."""
        return self.state(shape) if callable(self.state) else dict.fromkeys(self.state, shape)

    def suits(self, configs: Sequence[Sequence[dict[str, Any]]]) -> bool:
        """Say whether M lists of G configs agree on what has to be common."""
        kinds = [[[config.get(name) for name in self.common] for config in own] for own in configs]
        return all(kind == kinds[0] for kind in kinds)


_STEP = {"step": 0.0}
_ADAM = ("exp_avg", "exp_avg_sq")
_AMSGRAD = {"max_exp_avg_sq": "amsgrad"}
_MUON = ("nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")

# The classes with a stacked rule.
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
    torch.optim.Adafactor: Rule(adafactor, _STEP, factors, with_none=("eps",), real_only=True),
    torch.optim.Muon: Rule(muon, {}, ("momentum_buffer",), common=_MUON, real_only=True),
}


@cache
def ruled_class(optimizer_cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer] | None:
    """Return the class whose rule does what this one does: itself, or a parent of which it overrides no more than
    `__init__` and `zero_grad`; None where there is none.

    Example:
        >>> class Mine(torch.optim.AdamW):
        ...     def __init__(self, params, lr=0.1):
        ...         super().__init__(params, lr, betas=(0.9, 0.95))
        >>> ruled_class(Mine).__name__
        'AdamW'
    """
    for cls in optimizer_cls.__mro__:
        if cls in RULES:
            return cls
        for name, value in vars(cls).items():
            if name == "step" and inspect.unwrap(value) is inspect.unwrap(getattr(super(cls, cls), name, None)):
                continue  # the inherited one, around which torch puts its hooks
            dunder = name.startswith("__") and name.endswith("__")
            if (callable(value) or hasattr(value, "__get__")) and not dunder and name != "zero_grad":
                return None
    return None


@cache
def known_hyperparameters(cls: type[torch.optim.Optimizer]) -> tuple[str, ...]:
    """Return the names of what the rule of a class reads."""
    lone = cls([torch.nn.Parameter(torch.empty(1, 1, device="meta"))])
    return tuple(name for name in lone.defaults if name not in SWITCHES)
