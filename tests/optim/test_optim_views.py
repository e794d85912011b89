"""Classes without a stacked rule, people's own included, against M lone runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from optimizers import VIEWED, GlobalNorm, M, config_of, largest_difference, start, step_alone, step_batch
from optimizers import train_alone as step_lone_models
from oracle import SEEDS, assert_same_parameters, batches, train_alone
from torch import nn, optim

from mbkit import ModelBatch, fit
from mbkit.optim import OptimizerFactory

every_viewed = pytest.mark.parametrize("case", VIEWED, ids=lambda case: case[0].__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_viewed
def test_equals_lone_runs_to_the_bit(case: tuple[type, dict], dtype: torch.dtype) -> None:
    models, batch, optimizer = start(*case, dtype)
    step_batch(optimizer, batch, range(25))
    assert largest_difference(batch, models) > 1e-3
    step_lone_models(*case, models, range(25))
    assert largest_difference(batch, models) == 0


@every_viewed
def test_numbers_written_mid_run_are_used_and_read(case: tuple[type, dict]) -> None:
    models, batch, optimizer = start(*case, torch.float64)
    lone = [case[0](model.parameters(), **config_of(case[1], m)) for m, model in enumerate(models)]
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


class Langevin(optim.Optimizer):
    """SGLD: each step adds noise to the parameters."""

    def __init__(self, params: list, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"]).add_(torch.randn_like(p), alpha=0.1)


@pytest.mark.parametrize("count", [3, 4])
def test_noise_in_a_step_comes_from_the_models_own_stream(count: int) -> None:
    """Dropout in the forward pass and noise in the step draw in turn from one stream, as they do alone."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double() for _ in range(count)]
    data = batches(own=False)
    batch = ModelBatch(models, seeds=SEEDS[:count])
    optimizer = OptimizerFactory(Langevin).create_optimizer(batch, lr=0.05)
    state = torch.get_rng_state()
    fit(batch, optimizer, data[:3], nn.functional.mse_loss, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    batch.freeze(1)
    kept = batch.streams.on("cpu")[1].get_state()
    fit(batch, optimizer, data[3:], nn.functional.mse_loss, progress=False)
    assert torch.equal(batch.streams.on("cpu")[1].get_state(), kept)
    for m, model in enumerate(models):
        steps = data[:3] if m == 1 else data
        train_alone([model], steps, seeds=[SEEDS[m]], optimizer_cls=Langevin, configs={"lr": 0.05})
    assert_same_parameters(batch.models, models, 1e-12)


class Scheduled(optim.SGD):
    """Writes its mode into its groups, as schedule-free optimizers do, and takes lr=None, as T5's Adafactor does."""

    def __init__(self, params: list, lr: float | None = None) -> None:
        super().__init__(params, 0.1 if lr is None else lr)
        for group in self.param_groups:
            group["training"] = False

    def train(self) -> None:
        for group in self.param_groups:
            group["training"] = True

    def step(self, closure: Callable | None = None) -> None:
        assert all(group["training"] for group in self.param_groups)
        super().step(closure)


def test_what_a_lone_optimizer_writes_into_its_own_groups_stays() -> None:
    batch = ModelBatch([nn.Linear(2, 1) for _ in range(3)])
    optimizer = OptimizerFactory(Scheduled).create_optimizer(batch, lr=None)
    optimizer.train()
    batch(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert [group["training"] for group in optimizer.param_groups] == [True] * 3
    optimizer.param_groups[1]["lr"] = 0.5
    optimizer.step()
    assert [lone.param_groups[0]["lr"] for lone in optimizer.lone] == [0.1, 0.5, 0.1]
