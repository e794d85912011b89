"""Muon, whose update is made of products in bfloat16: within the noise that bfloat16 makes of a lone run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, optim

from mbkit import ModelBatch, OptimizerFactory
from mbkit.optim.stacked import StackedOptimizer
from mbkit.optim.views import ViewsOptimizer
from mbkit.training.step import StepOptions, Stepper

pytestmark = pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
MSE = nn.functional.mse_loss
M, RATES = 4, [0.1, 0.03, 0.01, 0.003]
CASES = [
    {},
    {"momentum": [0.9, 0.0, 0.5, 0.99], "weight_decay": [0.0, 0.1, 0.3, 0.01]},
    {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    {"ns_steps": [5, 3, 5, 4], "nesterov": [True, False, True, False]},
]


def build(dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(0)
    sizes = ((5, 3), (3, 7), (4, 4))
    return [nn.ParameterList(torch.randn(n, k, dtype=dtype) for n, k in sizes) for _ in range(M)]


def gradients(step: int, m: int, like: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + m)
    return [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in like.parameters()]


def train_alone(models: list[nn.Module], numbers: dict, steps: range, noise: float = 0.0) -> list[optim.Optimizer]:
    made = []
    for m, model in enumerate(models):
        own = {name: value[m] if isinstance(value, list) else value for name, value in numbers.items()}
        made.append(optim.Muon(model.parameters(), lr=RATES[m], **own))
        for step in steps:
            for p, g in zip(model.parameters(), gradients(step, m, model), strict=True):
                p.grad = g * (1 + noise * torch.rand(g.shape, generator=torch.Generator().manual_seed(step))).to(
                    g.dtype
                )
            made[-1].step()
    return made


def train_batch(batch: ModelBatch, optimizer: optim.Optimizer, steps: range, chosen: list[int]) -> None:
    for step in steps:
        each = [gradients(step, m, batch[0]) for m in chosen]
        for p, own in zip(batch.parameters(), zip(*each, strict=True), strict=True):
            p.grad = torch.stack(own)
        optimizer.step()


def distance(models: list[nn.Module], others: list[nn.Module]) -> float:
    each = [(m.parameters(), n.parameters()) for m, n in zip(models, others, strict=True)]
    return max((p - q).abs().max().item() for pair in each for p, q in zip(*pair, strict=True))


@pytest.mark.parametrize("numbers", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_model_is_trained_as_alone(numbers: dict, dtype: torch.dtype) -> None:
    """The noise: the lone runs, their gradients changed by at most bfloat16's spacing."""
    batch = ModelBatch(build(dtype))
    optimizer = OptimizerFactory(optim.Muon).create_optimizer(batch, lr=RATES, **numbers)
    assert type(optimizer) is (ViewsOptimizer if isinstance(numbers.get("ns_steps"), list) else StackedOptimizer)
    train_batch(batch, optimizer, range(6), list(range(M)))
    lone, noisy = build(dtype), build(dtype)
    train_alone(lone, numbers, range(6))
    train_alone(noisy, numbers, range(6), noise=2**-7)
    assert 0 < 3 * distance(noisy, lone) < 0.3 * distance(lone, build(dtype))
    assert distance(batch.models, lone) <= 3 * distance(noisy, lone)


def test_states_go_on_alone_and_in_a_smaller_batch() -> None:
    batch = ModelBatch(build(torch.float64))
    optimizer = OptimizerFactory(optim.Muon).create_optimizer(batch, lr=RATES, momentum=0.9)
    train_batch(batch, optimizer, range(3), list(range(M)))
    single, small = optimizer.unstack(1), ModelBatch([batch[3], batch[1]])
    chosen = optimizer.select([3, 1], small)
    loaded_into = ModelBatch(batch.models)
    loaded = OptimizerFactory(optim.Muon).create_optimizer(loaded_into)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_batch(batch, optimizer, range(3, 6), list(range(M)))
    train_batch(small, chosen, range(3, 6), [3, 1])
    train_batch(loaded_into, loaded, range(3, 6), list(range(M)))
    for step in range(3, 6):
        for p, g in zip(single.model.parameters(), gradients(step, 1, single.model), strict=True):
            p.grad = g
        single.step()
    lone, noisy = build(torch.float64), build(torch.float64)
    train_alone(lone, {"momentum": 0.9}, range(6))
    train_alone(noisy, {"momentum": 0.9}, range(6), noise=2**-7)
    for got in ([single.model], [small[1]], [batch[1]], [loaded_into[1]]):
        assert distance(got, lone[1:2]) <= 3 * distance(noisy, lone)
    assert distance([small[0]], lone[3:]) <= 3 * distance(noisy, lone)


def test_what_all_models_have_in_common_cannot_be_told_apart_later() -> None:
    batch = ModelBatch(build(torch.float32))
    optimizer = OptimizerFactory(optim.Muon).create_optimizer(batch, lr=RATES)
    optimizer.param_groups[2]["ns_steps"] = 3
    with pytest.raises(ValueError, match="Expected one 'ns_steps' for all models, got 5 and 3 for model 2"):
        train_batch(batch, optimizer, range(1), list(range(M)))
    for group in optimizer.param_groups:
        group["ns_steps"] = 3
    train_batch(batch, optimizer, range(4), list(range(M)))
    lone, noisy = build(torch.float32), build(torch.float32)
    train_alone(lone, {"ns_steps": 3}, range(4))
    train_alone(noisy, {"ns_steps": 3}, range(4), noise=2**-7)
    assert distance(batch.models, lone) <= 3 * distance(noisy, lone)


def test_only_matrices_are_taken() -> None:
    with pytest.raises(ValueError, match=r"Muon refuses .* of model 0, .* only supports 2D parameters"):
        OptimizerFactory(optim.Muon).create_optimizer(ModelBatch([nn.Linear(2, 2) for _ in range(2)]))
    batch = ModelBatch([nn.ParameterList([torch.randn(2, 3, dtype=torch.complex64)]) for _ in range(2)])
    batch.stacked_params["0"].grad = torch.ones_like(batch.stacked_params["0"])
    with pytest.raises(RuntimeError, match="complex"):
        OptimizerFactory(optim.Muon).create_optimizer(batch).step()


@pytest.mark.slow
def test_a_compiled_step_takes_it() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)) for _ in range(M)]
    data = [(torch.randn(6, 3), torch.randn(6, 2)) for _ in range(4)]
    batch, lone = ModelBatch(models), copy.deepcopy(models)
    stepper = Stepper(
        batch, OptimizerFactory(optim.Muon).create_optimizer(batch, lr=RATES), StepOptions(MSE, compile=True)
    )
    for x, y in data:
        stepper.step(x, y)
    assert stepper.how == "compiled"
    for model, lr in zip(lone, RATES, strict=True):
        optimizer = optim.Muon(model.parameters(), lr=lr)
        for x, y in data:
            optimizer.zero_grad()
            MSE(model(x), y).backward()
            optimizer.step()
    assert distance(batch.models, lone) < 0.05 * distance(lone, models)
