"""Adam's fused kernel: when it is taken, and that it works on what is there now, whatever the layout."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from oracle import assert_same_parameters
from torch import nn, optim

from mbkit import GradScaler, ModelBatch, OptimizerFactory

RATES = [0.1, 0.2, 0.3]
adams = pytest.mark.parametrize("cls", [optim.Adam, optim.AdamW])


def step_all(
    batch: ModelBatch, optimizer: optim.Optimizer, models: Sequence[nn.Module], lones: Sequence, **grads
) -> None:
    """Make a step of the batch and of each lone model, with random gradients, or with those given by name."""
    for name, stacked in batch.named_parameters():
        stacked.grad = grads.get(name.replace(".", "_"), torch.randn(stacked.shape, dtype=stacked.dtype))
        for m, model in enumerate(models):
            model.get_parameter(name).grad = None if stacked.grad is None else stacked.grad[m].clone()
    for one in (optimizer, *lones):
        one.step()


@adams
@pytest.mark.parametrize("fused", [None, False])
def test_larger_models_take_the_fused_kernel_unless_told_not_to(monkeypatch, cls, fused):
    """With fused=False the bits are those of torch's for-loop, without it those of torch's fused kernel."""
    calls = []
    name = "_fused_adam_" if cls is optim.Adam else "_fused_adamw_"
    kernel = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *args, **rest: calls.append(1) or kernel(*args, **rest))
    models = [nn.Linear(130, 130) for _ in RATES]
    batch, settings = ModelBatch(models), {"weight_decay": 0.1, "betas": (0.8, 0.95)}
    optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=RATES, fused=fused, **settings)
    lones = [
        cls(own.parameters(), lr=lr, fused=fused is None, **settings) for own, lr in zip(models, RATES, strict=True)
    ]
    for _ in range(4):
        step_all(batch, optimizer, models, ())
        assert len(calls) == (3 if fused is None else 0)
        for lone in lones:
            lone.step()
        calls.clear()
    assert_same_parameters(batch.models, models, 0)
    taken = optimizer.unstack(1)
    assert all(torch.equal(taken.state[p]["step"], torch.tensor(4.0)) for p in taken.param_groups[0]["params"])


@pytest.mark.parametrize("change", ["state", "data", "no gradient"])
def test_the_fused_kernel_works_on_what_is_there_now(change):
    """The state is loaded anew, or weights move, or a bias is left out; the bits are those of torch's fused kernel."""
    models = [nn.Linear(130, 130) for _ in RATES]
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, lr=RATES)
    lones = [optim.Adam(model.parameters(), lr=lr, fused=True) for model, lr in zip(models, RATES, strict=True)]
    for step in range(6):
        if change == "state" and step == 1:
            states = [copy.deepcopy(one.state_dict()) for one in (optimizer, *lones)]
        if change == "state" and step == 3:
            for one, state in zip((optimizer, *lones), states, strict=True):
                one.load_state_dict(state)
        if change == "data" and step == 3:
            for one in (batch, *models):
                one.weight.data = one.weight.data * 0.5
        step_all(
            batch, optimizer, models, lones, **({"bias": None} if change == "no gradient" and step in (2, 4) else {})
        )
        assert_same_parameters(batch.models, models, 0)


def images() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 4))
        for _ in range(4)
    ]


@adams
@pytest.mark.parametrize("how", ["moved in between", "loaded into another layout", "gradients in another layout"])
def test_layouts_may_differ_between_weights_moments_and_gradients(cls, how):
    """Against torch's for-loop in float32. Alone, too, channels_last only changes an order, so 1e-5 is rounding.

    Where the moments met other weights than their own, it was off by 5e-2.
    """
    models = images()
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=1e-3)
    lones = [cls(model.parameters(), lr=1e-3, foreach=False) for model in models]
    for step in range(6):
        if step == 3 and how == "moved in between":
            batch.to(memory_format=torch.channels_last)
        if step == 3 and how == "loaded into another layout":
            state, batch = optimizer.state_dict(), ModelBatch(batch.models).to(memory_format=torch.channels_last)
            optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=1e-3)
            optimizer.load_state_dict(state)
        shapes = {name.replace(".", "_"): p.shape for name, p in batch.named_parameters() if p.dim() == 5}
        turned = {name: torch.randn(shape).movedim(2, -1).contiguous().movedim(-1, 2) for name, shape in shapes.items()}
        step_all(batch, optimizer, models, lones, **(turned if how == "gradients in another layout" else {}))
    assert_same_parameters(batch.models, models, 1e-5)


@pytest.mark.parametrize("cls", [optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop])
@pytest.mark.parametrize(("count", "width"), [(3, 8), (5, 8), (5, 1000)])
@pytest.mark.parametrize("how", ["frozen", "skipped by a scaler"])
def test_the_others_keep_their_bits_when_one_takes_no_part(cls, count, width, how):
    """In float32, where another kernel would have other bits; the reference is the same batch with all taking part."""
    ends = []
    for stop in (False, True):
        torch.manual_seed(0)
        batch = ModelBatch([nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 4)) for _ in range(count)])
        optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=0.01)
        for step in range(6):
            for p in batch.parameters():
                p.grad = torch.randn_like(p)
            if stop and step == 3:
                kept = [p[1].clone() for p in batch.parameters()]
                if how == "frozen":
                    batch.freeze(1)
            if how == "frozen":
                optimizer.step()
                continue
            if stop and step >= 3:
                next(batch.parameters()).grad[1] = torch.inf
            scaler = GradScaler(init_scale=1.0)
            scaler.scale(torch.ones(count))
            scaler.step(optimizer)
        ends.append([p.detach().clone() for p in batch.parameters()])
    others = [0, *range(2, count)]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(*ends, strict=True))
    assert all(torch.equal(p[1], was) for p, was in zip(ends[1], kept, strict=True))


def test_counts_of_another_dtype_take_the_rule():
    """torch makes counts in the default dtype, and its kernel reads four bytes of each."""
    torch.set_default_dtype(torch.float64)
    models = [nn.Linear(3, 2).float() for _ in RATES]
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, lr=0.1)
    lones = [optim.Adam(model.parameters(), lr=0.1) for model in models]
    for _ in range(3):
        step_all(batch, optimizer, models, lones)
    assert_same_parameters(batch.models, models, 1e-5)
