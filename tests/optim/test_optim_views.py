"""Classes without a stacked rule, people's own included, against M lone runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from test_optim_rules import TABLE, M, config_of, largest_difference, shapes, step_alone, step_batch
from torch import nn, optim

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory

LR = {"lr": [0.1, 0.03, 0.01, 0.003]}


class SignAdam(optim.Adam):
    """A subclass with a step of its own, which an Adam rule would get wrong."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


class SubNAdam(optim.NAdam):
    """A subclass of a class that keeps a float32 number beside float64 parameters."""


class GlobalNorm(optim.Optimizer):
    """Its step size depends on all groups at once, and it writes what it found into its group."""

    def __init__(self, params: list, lr: float, norm_type: float = 2.0) -> None:
        super().__init__(params, {"lr": lr})
        self.norm_type = norm_type  # an attribute, not in any group

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([torch.linalg.vector_norm(g, self.norm_type) for g in grads]).norm()
        for group in self.param_groups:
            group["largest"] = max(group.get("largest", 0.0), norm.item())
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / norm, alpha=group["lr"] / group["largest"])


class Matrices(nn.Module):
    """Muon takes nothing but matrices."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(5, 3, dtype=dtype)) for _ in range(2))


VIEWED = [
    (optim.ASGD, {**LR, "lambd": [1e-4, 0.1, 0.0, 0.01], "alpha": [0.75, 0.5, 1.0, 0.1], "t0": [0, 5, 10, 1e6]}),
    (optim.Rprop, {**LR, "etas": [(0.5, 1.2), (0.3, 1.5), (0.9, 1.1), (0.5, 2.0)], "maximize": [True, False] * 2}),
    (optim.Adafactor, {**LR, "weight_decay": [0.0, 0.1, 0.2, 0.3], "d": [1.0, 4.0, 2.0, 1.5]}),
    (SignAdam, LR),
    (SubNAdam, {**LR, "momentum_decay": [4e-3, 0.0, 0.1, 1.0]}),
    (GlobalNorm, {**LR, "norm_type": [2.0, 1.0, math.inf, 3.0]}),
]


every_viewed = pytest.mark.parametrize("case", VIEWED, ids=lambda case: case[0].__name__)


def lone_of(cls: type, hyperparameters: dict, models: list[nn.Module]) -> list[optim.Optimizer]:
    return [cls(model.parameters(), **config_of(hyperparameters, m)) for m, model in enumerate(models)]


def start(cls: type, hyperparameters: dict, dtype: torch.dtype = torch.float32):
    """Return M models, a batch of them, and its optimizer."""
    models = shapes(dtype)
    batch = ModelBatch(models)
    return models, batch, OptimizerFactory(cls).create_optimizer(batch, **hyperparameters)


def same(first: ModelBatch, second: ModelBatch) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


# For other files: each class once, its hyperparameters differing between the models as much as they can.
ALL = [(cls, variants[-1]) for cls, variants in TABLE.items()] + VIEWED
every_class = pytest.mark.parametrize("case", ALL, ids=lambda case: case[0].__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_viewed
def test_equals_lone_runs_to_the_bit(case: tuple[type, dict], dtype: torch.dtype) -> None:
    models, batch, optimizer = start(*case, dtype)
    step_batch(optimizer, batch, range(25))
    assert largest_difference(batch, models) > 1e-3
    for m, lone in enumerate(lone_of(*case, models)):
        step_alone(lone, models[m], m, range(25))
    assert largest_difference(batch, models) == 0


@every_viewed
def test_numbers_written_mid_run_are_used_and_read(case: tuple[type, dict]) -> None:
    models, batch, optimizer = start(*case, torch.float64)
    lone = lone_of(*case, models)
    for steps, lr in ((range(3), 0.05), (range(3, 6), 0.002)):
        optimizer.param_groups[1]["lr"] = lone[1].param_groups[0]["lr"] = lr
        step_batch(optimizer, batch, steps)
        for m in range(M):
            step_alone(lone[m], models[m], m, steps)
    assert largest_difference(batch, models) == 0
    for m in range(M):
        for name, value in lone[m].param_groups[0].items():
            assert name == "params" or optimizer.param_groups[m][name] == value


@every_viewed
def test_no_gradient_outlives_its_step(case: tuple[type, dict]) -> None:
    _, batch, optimizer = start(*case, torch.float32)
    step_batch(optimizer, batch, range(1))
    assert all(p.grad is None for lone in optimizer.lone for p in lone.param_groups[0]["params"])
    before = [p.detach().clone() for p in batch.parameters()]
    optimizer.zero_grad()
    optimizer.step() if case[0] is not GlobalNorm else None
    assert all(torch.equal(p, q) for p, q in zip(batch.parameters(), before, strict=True))


@every_viewed
def test_follows_the_batch_to_another_dtype(case: tuple[type, dict]) -> None:
    models, batch, optimizer = start(*case, torch.float32)
    step_batch(optimizer, batch, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    other = ModelBatch([model.double() for model in batch.models])
    loaded = OptimizerFactory(case[0]).create_optimizer(other, **case[1])
    loaded.load_state_dict(state)
    step_batch(loaded, other, range(3, 6))
    batch.double()
    step_batch(optimizer, batch, range(3, 6))
    assert largest_difference(batch, models) > 1e-3
    assert largest_difference(batch, other.models) == 0


@pytest.mark.parametrize("moved", [False, True])
def test_autograd_notices_the_update(moved: bool) -> None:
    batch = ModelBatch([nn.Linear(2, 1) for _ in range(2)])
    optimizer = OptimizerFactory(optim.Rprop).create_optimizer(batch)
    x = torch.ones(3, 2)
    if moved:
        batch, x = batch.double(), x.double()
    loss = (batch(x) ** 2 * batch.stacked_params["weight"].square().sum()).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
def test_muon_equals_lone_runs() -> None:
    models = [Matrices(torch.float64) for _ in range(M)]
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(optim.Muon).create_optimizer(batch, **LR)
    lone = lone_of(optim.Muon, LR, models)
    for step in range(5):
        g = torch.randn(2, M, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for i, name in enumerate(("first", "second")):
            batch.stacked_params[name].grad = g[i].clone()
            for m in range(M):
                getattr(models[m], name).grad = g[i, m].clone()
        optimizer.step()
        for one in lone:
            one.step()
    assert largest_difference(batch, models) == 0
