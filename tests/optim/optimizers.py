"""What the tests of optimizers share: every class with its hyperparameters, parameters of odd shapes, lone runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory

M = 4
LR = {"lr": [0.1, 0.03, 0.01, 0.0]}
DECAY = {"weight_decay": [0.0, 0.1, 0.01, 0.3]}
BETAS = {"betas": [(0.9, 0.999), (0.8, 0.9), (0.0, 0.5), (0.5, 0.0)]}
EPS = {"eps": [1e-8, 1e-3, 1e-10, 0.1]}
MAXIMIZE = {"maximize": [False, True, False, True]}
DECOUPLED = {"decoupled_weight_decay": [False, True, False, True]}

# One entry a rule: the hyperparameters that vary one at a time, then combinations that interact.
TABLE: dict[type, list[dict]] = {
    optim.SGD: [
        LR,
        DECAY,
        MAXIMIZE,
        {"momentum": [0.9, 0.5, 0.99, 0.1]},
        {"momentum": [0.9, 0.0, 0.5, 0.0]},
        {"momentum": 0.9, "dampening": [0.0, 0.5, 1.0, 0.1]},
        {"momentum": [0.9, 0.0, 0.5, 0.9], "dampening": [0.5, 0.5, 0.0, 0.9]},
        {"momentum": 0.9, "nesterov": [True, False, True, False]},
        {"momentum": 0.9, "nesterov": True, **DECAY, **LR, **MAXIMIZE},
        {"momentum": [0.9, 0.0, 0.5, 0.9], "nesterov": [True, False, True, False], "dampening": [0, 0.3, 0, 0.3]},
    ],
    optim.Adam: [
        LR,
        BETAS,
        EPS,
        DECAY,
        MAXIMIZE,
        {"amsgrad": [True, False, False, True]},
        {"amsgrad": True, **BETAS},
        {**LR, **BETAS, **EPS, **DECAY, **MAXIMIZE, "amsgrad": [True, False, True, False]},
    ],
    optim.AdamW: [LR, BETAS, EPS, DECAY, MAXIMIZE, {"amsgrad": [True, False, True, False], **DECAY, **LR}],
    optim.RMSprop: [
        LR,
        DECAY,
        EPS,
        MAXIMIZE,
        {"alpha": [0.99, 0.9, 0.0, 0.5]},
        {"centered": [True, False, True, False], **EPS},
        {"centered": True, "eps": 1e-3},
        {"momentum": [0.9, 0.5, 0.1, 0.99]},
        {"momentum": [0.9, 0.0, 0.5, 0.0], "centered": [True, True, False, False], **EPS, **DECAY, **LR},
    ],
    optim.Adagrad: [
        LR,
        DECAY,
        EPS,
        MAXIMIZE,
        {"lr_decay": [0.0, 0.1, 0.5, 0.01]},
        {"initial_accumulator_value": [0.0, 0.1, 1.0, 0.5], "lr_decay": 0.1},
    ],
    optim.Adadelta: [
        LR,
        DECAY,
        EPS,
        MAXIMIZE,
        {"rho": [0.9, 0.5, 0.0, 1.0]},
        {**LR, **DECAY, "rho": [0.9, 0.5, 0.99, 0.7]},
    ],
    optim.Adamax: [LR, BETAS, EPS, DECAY, MAXIMIZE, {**LR, **BETAS, **EPS, **DECAY}],
    optim.NAdam: [
        LR,
        BETAS,
        EPS,
        DECAY,
        MAXIMIZE,
        {"momentum_decay": [4e-3, 0.0, 0.1, 1.0]},
        {**DECAY, **DECOUPLED, **LR},
        {**DECAY, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, **DECOUPLED},
    ],
    optim.RAdam: [
        LR,
        {"betas": [(0.9, 0.999), (0.8, 0.9), (0.5, 0.95), (0.9, 0.7)]},
        EPS,
        DECAY,
        MAXIMIZE,
        {**DECAY, **DECOUPLED, **LR},
        {**DECAY, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, **DECOUPLED},
    ],
    optim.Adafactor: [
        LR,
        DECAY,
        MAXIMIZE,
        {"beta2_decay": [-0.8, -0.1, 0.0, -1.0]},
        {"eps": [(None, 1e-3), (1e-3, 0.1), (None, 0.0), (1e-30, 2.0)]},
        {"d": [1.0, 4.0, 2.0, 1.5], **DECAY, **LR, **MAXIMIZE},
    ],
}


class Shapes(nn.Module):
    """Parameters of 0 to 4 dimensions, with odd sizes, so that vectorised kernels meet their tails."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype)))


SHAPES = {"scalar": (), "bias": (5,), "weight": (7, 11), "kernel": (2, 3, 5, 5)}


def shapes(dtype: torch.dtype) -> list[nn.Module]:
    """M models with other weights, the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [Shapes(dtype) for _ in range(M)]


@functools.cache
def gradients(dtype: torch.dtype, step: int) -> list[Tensor | None]:
    """The stacked gradients of a step: noise, exact zeros, and for one parameter now and then none at all."""
    generator = torch.Generator().manual_seed(step)
    grads: list[Tensor | None] = []
    for name, shape in SHAPES.items():
        g = torch.randn(M, *shape, dtype=dtype, generator=generator)
        g[torch.rand(g.shape, generator=generator) < 0.1] = 0
        grads.append(None if name == "bias" and step % 3 == 1 else g)
    return grads


def config_of(hyperparameters: dict, m: int) -> dict:
    return {name: value[m] if isinstance(value, list) else value for name, value in hyperparameters.items()}


def train_alone(cls: type, hyperparameters: dict, models: list[nn.Module], steps: range) -> list[optim.Optimizer]:
    optimizers = []
    for m, model in enumerate(models):
        optimizer = create_alone(cls, hyperparameters, model, m)
        step_alone(optimizer, model, m, steps)
        optimizers.append(optimizer)
    return optimizers


def step_alone(optimizer: optim.Optimizer, model: nn.Module, m: int, steps: range) -> None:
    for step in steps:
        for p, g in zip(model.parameters(), gradients(next(model.parameters()).dtype, step), strict=True):
            p.grad = None if g is None else g[m].clone()
        optimizer.step()


def step_batch(
    optimizer: optim.Optimizer, batch: ModelBatch, steps: range, models: list[int] | slice = slice(None)
) -> None:
    """Make steps of a batch that holds some of the M models."""
    for step in steps:
        for p, g in zip(batch.parameters(), gradients(next(batch.parameters()).dtype, step), strict=True):
            p.grad = None if g is None else g[models].clone()
        optimizer.step()


CHOSEN = [3, 1]


def select(batch: ModelBatch, optimizer: optim.Optimizer) -> tuple[ModelBatch, optim.Optimizer]:
    """Return a batch of the chosen models, and their optimizer."""
    small = batch.select(CHOSEN)
    return small, optimizer.select(CHOSEN, small)


def largest_difference(batch: ModelBatch, models: list[nn.Module]) -> float:
    rows = [torch.stack([q.detach() for q in own]) for own in zip(*[m.parameters() for m in models], strict=True)]
    return max((p - q).abs().max().item() for p, q in zip(batch.parameters(), rows, strict=True))


# ---------------------------------------------------------------------- classes without a stacked rule

RATES = {"lr": [0.1, 0.03, 0.01, 0.003]}


class SignAdam(optim.Adam):
    """A subclass with a step of its own, which an Adam rule would get wrong."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


class SubNAdam(optim.NAdam):
    """A subclass, with a step of its own, of a class that keeps a float32 number beside float64 parameters."""

    def step(self, closure: Callable | None = None) -> Tensor | None:
        return super().step(closure)


class GlobalNorm(optim.Optimizer):
    """Its step size depends on all groups at once, and it writes what it found into its group."""

    def __init__(self, params: list, lr: float, norm_type: float = 2.0) -> None:
        super().__init__(params, {"lr": lr})
        self.norm_type = norm_type  # an attribute, not in any group

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        loss = torch.enable_grad()(closure)() if closure else None
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([torch.linalg.vector_norm(g, self.norm_type) for g in grads]).norm()
        for group in self.param_groups:
            group["largest"] = max(group.get("largest", 0.0), norm.item())
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / norm, alpha=group["lr"] / group["largest"])
        return loss


class Lion(optim.Optimizer):
    """As its most used implementation writes it, with a number of steps beside."""

    def __init__(self, params: list, lr: float = 1e-4, betas: tuple = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                grad, lr, wd, state = p.grad, group["lr"], group["weight_decay"], self.state[p]
                (beta1, beta2) = group["betas"]
                if len(state) == 0:
                    state["exp_avg"], state["step"] = torch.zeros_like(p), 0
                state["step"] += 1
                p.data.mul_(1 - lr * wd)
                update = state["exp_avg"].clone().mul_(beta1).add(grad, alpha=1 - beta1).sign_()
                p.add_(update, alpha=-lr)
                state["exp_avg"].mul_(beta2).add_(grad, alpha=1 - beta2)
        return loss


VIEWED = [
    (
        Lion,
        {**RATES, "betas": [(0.9, 0.99), (0.8, 0.9), (0.5, 0.5), (0.95, 0.98)], "weight_decay": [0.1, 0.2, 0.3, 0.4]},
    ),
    (optim.ASGD, {**RATES, "lambd": [1e-4, 0.1, 0.0, 0.01], "alpha": [0.75, 0.5, 1.0, 0.1], "t0": [0, 5, 10, 1e6]}),
    (optim.Rprop, {**RATES, "etas": [(0.5, 1.2), (0.3, 1.5), (0.9, 1.1), (0.5, 2.0)], "maximize": [True, False] * 2}),
    (SignAdam, RATES),
    (SubNAdam, {**RATES, "momentum_decay": [4e-3, 0.0, 0.1, 1.0]}),
    (GlobalNorm, {**RATES, "norm_type": [2.0, 1.0, math.inf, 3.0]}),
]


FOR_ALL = ("norm_type", "initial_accumulator_value")  # the classes read these from the keywords, not from the groups
FIRST = ("scalar", "weight")  # a group that is not in the order of the model, and not of neighbors
REST = [0.02, 0.01, 0.05, 0.0]  # the learning rates of the other parameters


def create(cls: type, hyperparameters: dict, batch: ModelBatch, in_groups: bool = False) -> optim.Optimizer:
    """Return the batch's optimizer, with the hyperparameters for all parameters or for the first of two groups."""
    if not in_groups:
        return OptimizerFactory(cls).create_optimizer(batch, **hyperparameters)
    both = {name: value for name, value in hyperparameters.items() if name in FOR_ALL}
    own = {name: value for name, value in hyperparameters.items() if name not in FOR_ALL}
    groups = [{"params": list(reversed(FIRST)), **own}, {"params": "*", "lr": REST}]
    return OptimizerFactory(cls).create_optimizer(batch, groups=groups, lr=0.01, **both)


def create_alone(
    cls: type, hyperparameters: dict, model: nn.Module, m: int, in_groups: bool = False
) -> optim.Optimizer:
    """Return the same for one model, in plain PyTorch, with torch's for-loop."""
    config = config_of(hyperparameters, m)
    loop = {"foreach": False} if "foreach" in cls.__init__.__code__.co_varnames else {}
    if not in_groups:
        return cls(model.parameters(), **loop, **config)
    both = {name: config.pop(name) for name in FOR_ALL if name in config}
    params = dict(model.named_parameters())
    groups = [
        {"params": [params.pop(name) for name in FIRST], **config},
        {"params": list(params.values()), "lr": REST[m]},
    ]
    return cls(groups, lr=0.01, **loop, **both)


def start(cls: type, hyperparameters: dict, dtype: torch.dtype = torch.float32, in_groups: bool = False):
    """Return M models, a batch of them, and its optimizer."""
    models = shapes(dtype)
    batch = ModelBatch(models)
    return models, batch, create(cls, hyperparameters, batch, in_groups)


def same(first: ModelBatch, second: ModelBatch) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


# For other files: each class once, its hyperparameters differing between the models as much as they can.
ALL = [(cls, variants[-1]) for cls, variants in TABLE.items()] + VIEWED
grouped = pytest.mark.parametrize("in_groups", [False, True], ids=["one group", "two groups"])
every_class = pytest.mark.parametrize("case", ALL, ids=lambda case: case[0].__name__)
