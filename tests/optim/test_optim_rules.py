"""Every update rule, every hyperparameter per model, against M lone runs of torch.optim's for-loop implementation."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor, nn, optim

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory
from mbkit.optim.rules import RULES
from mbkit.optim.stacked import _BLOCK

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
}
CASES = [
    pytest.param(cls, h, id=f"{cls.__name__}-{'+'.join(h)}-{i}") for cls, hs in TABLE.items() for i, h in enumerate(hs)
]
MIXED = [pytest.param(cls, hs[-1], id=cls.__name__) for cls, hs in TABLE.items()]


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
        optimizer = cls(model.parameters(), foreach=False, **config_of(hyperparameters, m))
        step_alone(optimizer, model, m, steps)
        optimizers.append(optimizer)
    return optimizers


def step_alone(optimizer: optim.Optimizer, model: nn.Module, m: int, steps: range) -> None:
    for step in steps:
        for p, g in zip(model.parameters(), gradients(next(model.parameters()).dtype, step), strict=True):
            p.grad = None if g is None else g[m].clone()
        optimizer.step()


def step_batch(optimizer: optim.Optimizer, batch: ModelBatch, steps: range) -> None:
    for step in steps:
        for p, g in zip(batch.parameters(), gradients(next(batch.parameters()).dtype, step), strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def largest_difference(batch: ModelBatch, models: list[nn.Module]) -> float:
    rows = [torch.stack([q.detach() for q in own]) for own in zip(*[m.parameters() for m in models], strict=True)]
    return max((p - q).abs().max().item() for p, q in zip(batch.parameters(), rows, strict=True))


def run(cls: type, hyperparameters: dict, dtype: torch.dtype, steps: int) -> tuple[ModelBatch, list[nn.Module]]:
    models = shapes(dtype)
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(cls).create_optimizer(batch, **hyperparameters)
    step_batch(optimizer, batch, range(steps))
    assert largest_difference(batch, models) > 1e-3  # it did train
    train_alone(cls, hyperparameters, models, range(steps))
    return batch, models


@pytest.mark.parametrize(("cls", "hyperparameters"), CASES)
def test_float64_equals_lone_runs(cls: type, hyperparameters: dict) -> None:
    batch, models = run(cls, hyperparameters, torch.float64, steps=25)
    assert largest_difference(batch, models) <= 1e-12


@pytest.mark.parametrize(("cls", "hyperparameters"), CASES)
def test_float32_equals_lone_runs_to_the_bit(cls: type, hyperparameters: dict) -> None:
    batch, models = run(cls, hyperparameters, torch.float32, steps=12)
    assert largest_difference(batch, models) == 0


@pytest.mark.parametrize(
    ("cls", "hyperparameters"), [pytest.param(cls, hs[0], id=cls.__name__) for cls, hs in TABLE.items()]
)
def test_bfloat16_equals_lone_runs(cls: type, hyperparameters: dict) -> None:
    batch, models = run(cls, hyperparameters, torch.bfloat16, steps=12)
    # torch's own x.add(y, alpha=a) gives an element other bits in the last part of a tensor than in its middle
    # (552 of 5,000 differ), so the two rules that end in one may be some last places (2**-6 for weights up to 4) off
    assert largest_difference(batch, models) <= (2**-4 if cls in (optim.SGD, optim.Adadelta) else 0)


@pytest.mark.parametrize(("cls", "hyperparameters"), MIXED)
def test_complex_parameters_equal_lone_runs(cls: type, hyperparameters: dict) -> None:
    # not to the bit: some classes decay weights in complex arithmetic, which rounds twice where real rounds once
    batch, models = run(cls, hyperparameters, torch.complex128, steps=12)
    assert largest_difference(batch, models) <= 1e-12


@pytest.mark.parametrize(("cls", "hyperparameters"), MIXED)
def test_large_batches_are_updated_block_by_block_to_the_same_bits(
    monkeypatch, cls: type, hyperparameters: dict
) -> None:
    sizes, rule = [], RULES[cls]
    counting = dataclasses.replace(rule, update=lambda ps, *rest: sizes.append(len(ps[0])) or rule.update(ps, *rest))
    monkeypatch.setitem(RULES, cls, counting)
    numbers = sum(math.prod(shape) for shape in SHAPES.values())
    monkeypatch.setitem(_BLOCK, "cpu", 3 * 4 * numbers)
    batch, models = run(cls, hyperparameters, torch.float32, steps=6)
    assert largest_difference(batch, models) == 0
    assert sizes[:4] == [3, 1, 3, 1]


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [None, False])
def test_larger_models_take_the_fused_kernel_unless_told_not_to(monkeypatch, cls, fused):
    """With fused=False the bits are those of torch's for-loop, without it those of torch's fused kernel."""
    calls = []
    name = "_fused_adam_" if cls is torch.optim.Adam else "_fused_adamw_"
    kernel = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *args, **rest: calls.append(1) or kernel(*args, **rest))
    torch.manual_seed(0)
    models = [torch.nn.Linear(130, 130) for _ in range(3)]
    lones = [copy.deepcopy(model) for model in models]
    batch = ModelBatch(models)
    settings = {"weight_decay": 0.1, "betas": (0.8, 0.95)}
    optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=[0.1, 0.2, 0.3], fused=fused, **settings)
    alone = [
        cls(lone.parameters(), lr=lr, fused=fused is None, **settings)
        for lone, lr in zip(lones, (0.1, 0.2, 0.3), strict=True)
    ]
    for _ in range(4):
        for i, stacked in enumerate(batch.parameters()):
            stacked.grad = torch.randn_like(stacked)
            for m, lone in enumerate(lones):
                list(lone.parameters())[i].grad = stacked.grad[m].clone()
        mine = len(calls)
        optimizer.step()
        assert len(calls) - mine == (3 if fused is None else 0)
        for lone in alone:
            lone.step()
    for stacked, *own in zip(batch.parameters(), *(lone.parameters() for lone in lones), strict=True):
        assert torch.equal(stacked, torch.stack(own))
    taken = optimizer.unstack(1)
    assert all(torch.equal(taken.state[p]["step"], torch.tensor(4.0)) for p in taken.param_groups[0]["params"])


@pytest.mark.parametrize("change", ["state", "data", "no gradient"])
def test_the_fused_kernel_works_on_what_is_there_now(change):
    """Its rows are kept from step to step; here the state is loaded anew, or weights move, or a bias is left out."""
    models, rates = [torch.nn.Linear(130, 130) for _ in range(3)], [0.1, 0.2, 0.3]
    batch, lones = ModelBatch(models), copy.deepcopy(models)
    optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=rates)
    alone = [torch.optim.Adam(lone.parameters(), lr=lr, fused=True) for lone, lr in zip(lones, rates, strict=True)]
    sides = ((batch, optimizer), *zip(lones, alone, strict=True))
    states = []
    for step in range(6):
        gradients = {name: torch.randn_like(p) for name, p in batch.named_parameters()}
        if change == "no gradient" and step in (2, 4):
            gradients["bias"] = None
        for m, (model, updates) in enumerate(sides, -1):  # the batch first
            if change == "state" and step == 1:
                states.append(copy.deepcopy(updates.state_dict()))
            if change == "state" and step == 3:
                updates.load_state_dict(states[m + 1])
            if change == "data" and step == 3:
                model.weight.data = model.weight.data * 0.5
            for name, p in model.named_parameters():
                given = gradients[name]
                p.grad = given if given is None or m < 0 else given[m].clone()
            updates.step()
        for name, p in batch.named_parameters():
            assert torch.equal(p, torch.stack([dict(lone.named_parameters())[name] for lone in lones]))
