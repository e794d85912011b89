"""People's own classes whose step runs for all models at once, under torch.vmap, against M lone runs."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import (
    RATES,
    GlobalNorm,
    Lion,
    M,
    create,
    create_alone,
    largest_difference,
    shapes,
    step_alone,
    step_batch,
)
from torch import nn, optim

from mbkit import ModelBatch, OptimizerFactory
from mbkit.optim import views


class Norms(optim.Optimizer):
    """Norms of weights and updates, numbers of its own in groups and attributes, gradients that it edits."""

    def __init__(self, params: Any, lr: float, eps: float = 1e-8, warm: int = 3, note: str | None = None) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "warm": warm, "note": note, "largest": 0.0, "foreach": None})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            group["largest"] = group["largest"] * 0.5 + group["lr"]
            lr = group["lr"] * min(1.0, self.steps / group["warm"]) / math.sqrt(self.steps)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["count"] = torch.zeros(())
                    state["mean"] = torch.zeros(p.shape, dtype=p.dtype)
                    state["rows"] = torch.zeros(p.shape[:1], dtype=p.dtype)
                state["count"] += 1
                p.grad.add_(p, alpha=group["lr"])
                state["mean"] = state["mean"].lerp(p.grad, 1 - group["eps"])
                state["rows"].add_(p.grad.reshape(*p.shape[:1], -1).sum(-1) if p.dim() else p.grad)
                state["mean"].addcmul_(p.grad, p.grad, value=group["lr"]).addcdiv_(p, 1 + p.square(), value=-lr)
                trust = p.norm() / (state["mean"].norm() + group["eps"])
                p.sub_(state["mean"] * trust * group["largest"] / state["count"], alpha=lr)


CASES = [
    (
        Lion,
        {**RATES, "betas": [(0.9, 0.99), (0.8, 0.9), (0.5, 0.5), (0.9, 0.99)], "weight_decay": [0.1, 0.2, 0.3, 0.4]},
    ),
    (Norms, {**RATES, "eps": [0.1, 0.2, 0.01, 0.3], "note": "one"}),
]


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the models that have made a step in turn."""
    seen: list[int] = []
    whole = views.ViewsOptimizer.in_turn
    monkeypatch.setattr(
        views.ViewsOptimizer,
        "in_turn",
        lambda self, call, models=None: seen.extend(models) or whole(self, call, models),
    )
    return seen


@pytest.mark.parametrize("in_groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_equals_lone_runs(case: tuple[type, dict], in_groups: bool, in_turn: list[int]) -> None:
    cls, hyperparameters = case
    models = shapes(torch.float64)
    batch, twin = ModelBatch(models), ModelBatch(models)
    optimizer = create(cls, hyperparameters, batch, in_groups)
    lones = [create_alone(cls, hyperparameters, model, m, in_groups) for m, model in enumerate(models)]
    step_batch(optimizer, batch, range(6))
    again = create(cls, hyperparameters, twin, in_groups)
    twin.load_state_dict(batch.state_dict())
    again.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for one in (optimizer, again):
        for group in one.groups_of(2):
            group["lr"] = 0.07
    step_batch(optimizer, batch, range(6, 12))
    step_batch(again, twin, range(6, 12))
    assert bool(in_turn) is in_groups  # where a rate of 0 leaves three models and one
    for m, lone in enumerate(lones):
        step_alone(lone, models[m], m, range(6))
        for group in lone.param_groups:
            group["lr"] = 0.07 if m == 2 else group["lr"]
        step_alone(lone, models[m], m, range(6, 12))
        for own, group in zip(optimizer.groups_of(m), lone.param_groups, strict=True):
            assert {n: v for n, v in own.items() if n != "params"} == {n: v for n, v in group.items() if n != "params"}
        for p, q in zip(batch.parameters(), models[m].parameters(), strict=True):
            torch.testing.assert_close(p.grad[m], q.grad, rtol=0, atol=1e-12)
    assert largest_difference(batch, models) <= 1e-12
    assert largest_difference(twin, models) <= (1e-12 if cls is Lion else math.inf)  # its count of steps is not saved
    state = optimizer.state_dict()["state"]["models"][1]["state"][0]
    for tensor in filter(torch.is_tensor, state.values()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_models_with_other_options_or_frozen_step_apart(in_turn: list[int]) -> None:
    """Five have no weight decay, four have some, one is frozen, one has no gradient for a parameter."""
    torch.manual_seed(0)
    models = [nn.Linear(3, 2).double() for _ in range(11)]
    decays = [0.0] * 5 + [0.1, 0.2, 0.1, 0.3] + [0.5, 0.6]
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(Lion).create_optimizer(batch, lr=0.1, weight_decay=decays)
    batch.freeze(0)
    lones = [Lion(model.parameters(), lr=0.1, weight_decay=wd) for model, wd in zip(models, decays, strict=True)]
    for _ in range(3):
        grads = [torch.randn_like(p) for p in batch.parameters()]
        for p, g in zip(batch.parameters(), grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for m, lone in list(enumerate(lones))[1:]:
            for p, g in zip(models[m].parameters(), grads, strict=True):
                p.grad = g[m].clone()
            lone.step()
    assert in_turn == []
    assert largest_difference(batch, models) <= 1e-12


class Alias(optim.SGD):
    """Keeps its own weights, which alone change with every step."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for p in self.param_groups[0]["params"]:
            kept = self.state[p].setdefault("kept", p.detach())
            if p.grad is not None:
                p.sub_(kept * p.grad, alpha=self.param_groups[0]["lr"])


class Halfway(optim.SGD):
    """Decides by a number that the models do not share, when a part of the update is made."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p.mul_(0.9)
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * (2 if p.sum() > 0 else 1))


class Assigned(optim.SGD):
    """Puts another tensor in place of its weights."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data = p.data - self.param_groups[0]["lr"] * p.grad


class Notes(optim.SGD):
    """Counts by a list."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.seen: list[int] = []

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        self.seen.append(len(self.seen))
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * len(self.seen))


class Forgets(optim.SGD):
    """Drops a part of its state every other step."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                kept = self.state[p].pop("kept", None)
                if kept is None:
                    self.state[p]["kept"] = p.grad.clone()
                p.sub_(p.grad if kept is None else kept, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("cls", [Alias, Halfway, Assigned, Notes, Forgets, GlobalNorm])
def test_what_cannot_run_at_once_runs_in_turn_from_where_it_was(cls: type, in_turn: list[int]) -> None:
    models = shapes(torch.float64)
    batch = ModelBatch(models)
    optimizer = create(cls, RATES, batch)
    step_batch(optimizer, batch, range(5))
    assert in_turn[-M:] == list(range(M))
    for m, model in enumerate(models):
        step_alone(create_alone(cls, RATES, model, m), model, m, range(5))
    assert largest_difference(batch, models) == 0
