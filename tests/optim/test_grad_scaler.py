"""The scaler of M models against M of torch's: scales, growth counts, skipped updates and parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import close
from torch import nn, optim

from mbkit import GradScaler, ModelBatch, OptimizerFactory

M, B, STEPS = 4, 6, 24
SETTINGS = {"init_scale": 2.0**10, "growth_factor": 3.0, "backoff_factor": 0.3, "growth_interval": 3}
OVERFLOWS = {(1, 0), (4, 2), (5, 2), (6, 0), (6, 1), (13, 3), (14, 3), (15, 3), (20, 1)}  # (step, model)
CLASSES = [(optim.Adam, {"weight_decay": 0.1}), (optim.SGD, {"momentum": 0.9}), (optim.Rprop, {})]


def build(dtype=torch.float64):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype) for _ in range(M)]


def data(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(M, B, n, dtype=torch.float64, generator=generator).to(dtype) for n in (3, 2))
    for m in range(M):
        if (step, m) in OVERFLOWS:
            y[m, 0, 0] = torch.inf if m % 2 else torch.nan
    return x, y


def train_alone(models, optimizers, scalers, max_norm=None):
    """Return each step's scales and growth counts."""
    seen = []
    for step in range(STEPS):
        x, y = data(step, models[0][0].weight.dtype)
        for m, (model, optimizer, scaler) in enumerate(zip(models, optimizers, scalers, strict=True)):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(x[m]), y[m])).backward()
            if max_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
        seen.append([(s.get_scale(), s.state_dict()["_growth_tracker"]) for s in scalers])
    return seen


def train_batch(batch, optimizer, scaler, steps=range(STEPS), max_norm=None):
    seen = []
    for step in steps:
        x, y = data(step, next(batch.parameters()).dtype)
        optimizer.zero_grad()
        losses = batch.compute_loss(batch(x), y, nn.functional.mse_loss, reduction="none")
        scaler.scale(losses).sum().backward()
        if max_norm:
            scaler.unscale_(optimizer)
            batch.clip_grad_norm_(max_norm)
        scaler.step(optimizer)
        scaler.update()
        seen.append(list(zip(scaler.get_scale(), scaler.state_dict()["_growth_tracker"], strict=True)))
    return seen


def batch_of(models, cls=optim.Adam, **numbers):
    batch = ModelBatch(models, shared_input=False)
    return batch, OptimizerFactory(cls).create_optimizer(batch, lr=[0.01, 0.02, 0.03, 0.04], **numbers)


@pytest.mark.parametrize("max_norm", [None, 0.05], ids=["", "clipped"])
@pytest.mark.parametrize(("cls", "numbers"), CLASSES, ids=lambda v: getattr(v, "__name__", ""))
def test_each_model_as_with_a_scaler_of_torchs(cls, numbers, max_norm):
    models = build()
    batch, optimizer = batch_of(copy.deepcopy(models), cls, **numbers)
    got = train_batch(batch, optimizer, GradScaler(**SETTINGS), max_norm=max_norm)
    lone = [cls(model.parameters(), lr=0.01 * (m + 1), **numbers) for m, model in enumerate(models)]
    scalers = [torch.amp.GradScaler("cpu", **SETTINGS) for _ in range(M)]
    assert got == train_alone(models, lone, scalers, max_norm)
    assert len(set(got[-1])) == 3  # they have gone their own ways
    for name, stacked in batch.stacked_params.items():
        for m, model in enumerate(models):
            close(stacked[m], model.get_parameter(name), 1e-12, f"{name} of model {m}")
    for m, one in enumerate(lone):
        mine = optimizer.unstack(m)
        for p, q in zip(one.param_groups[0]["params"], mine.param_groups[0]["params"], strict=True):
            if "step" in one.state[p]:
                assert mine.state[q]["step"] == one.state[p]["step"] < STEPS


def test_unscaled_gradients_are_torchs_to_the_bit():
    models = build(torch.float32)
    batch, optimizer = batch_of(copy.deepcopy(models))
    scaler = GradScaler(init_scale=1000.0)
    scaler.scale(torch.ones(M))
    for m, p in enumerate(batch.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(m))
    scaled = [p.grad.clone() for p in batch.parameters()]
    scaler.unscale_(optimizer)
    for m, model in enumerate(models):
        lone = optim.Adam(model.parameters())
        reference = torch.amp.GradScaler("cpu", init_scale=1000.0)
        reference.scale(torch.ones(()))
        for p, grad in zip(model.parameters(), scaled, strict=True):
            p.grad = grad[m].clone()
        reference.unscale_(lone)
        for p, q in zip(model.parameters(), batch.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad[m])


def test_a_scale_stays_finite():
    batch, optimizer = batch_of(build())
    scaler = GradScaler(init_scale=2.0**127, growth_interval=1)
    for p in batch.parameters():
        p.grad = torch.ones_like(p)
    scaler.scale(torch.ones(M))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == [2.0**127] * M


@pytest.mark.parametrize("way", ["state_dict", "state_dict, late", "pickle"])
def test_saved_and_loaded(way):
    batch, optimizer = batch_of(build())
    scaler = GradScaler(**SETTINGS)
    train_batch(batch, optimizer, scaler, range(8))
    if way == "pickle":
        other = pickle.loads(pickle.dumps(scaler))
    else:
        other = GradScaler()
        if way == "state_dict, late":
            other.scale(torch.ones(M))
        other.load_state_dict(scaler.state_dict())
    twin, its = batch_of(build())
    twin.load_state_dict(batch.state_dict())
    its.load_state_dict(optimizer.state_dict())
    assert train_batch(twin, its, other, range(8, STEPS)) == train_batch(batch, optimizer, scaler, range(8, STEPS))
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), batch.parameters(), strict=True))


def test_a_frozen_model_keeps_its_scale():
    batch, optimizer = batch_of(build())
    scaler = GradScaler(**SETTINGS)
    train_batch(batch, optimizer, scaler, range(5))
    kept = scaler.get_scale()[1], batch.get_model_states()[1]
    batch.freeze(1)
    train_batch(batch, optimizer, scaler, range(5, 12))
    assert scaler.get_scale()[1] == kept[0]
    assert all(torch.equal(batch.get_model_states()[1][name], t) for name, t in kept[1].items())


def test_disabled_it_does_nothing():
    batch, optimizer = batch_of(build())
    scaler = GradScaler(enabled=False)
    x, y = data(0)
    losses = batch.compute_loss(batch(x), y, nn.functional.mse_loss, reduction="none")
    assert scaler.scale(losses) is losses
    losses.sum().backward()
    before = batch[0][0].weight.clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(batch[0][0].weight, before)
    assert (scaler.get_scale(), scaler.state_dict()) == (1.0, {})


def test_refusals():
    batch, optimizer = batch_of(build())
    scaler = GradScaler()
    with pytest.raises(ValueError, match=r"Expected the losses \[M\], one per model, got \[\]: pass what compute_loss"):
        scaler.scale(torch.ones(()))
    scaler.scale(torch.ones(M))
    with pytest.raises(ValueError, match=r"Expected the losses \[4\], one per model, got \[3\]"):
        scaler.scale(torch.ones(3))
    with pytest.raises(TypeError, match="Expected an optimizer from OptimizerFactory for 4 models, got SGD"):
        scaler.step(optim.SGD(batch.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="before update"):
        GradScaler.update(scaler)
    with pytest.raises(ValueError, match=r"Expected one scale or 4 \(one per model\), got \[2\]"):
        scaler.update([1.0, 2.0])
    with pytest.raises(ValueError, match=r"Expected one scale or 4 \(one per model\), got \[3\]"):
        scaler.load_state_dict({**scaler.state_dict(), "scale": [1.0] * 3})
    assert scaler.get_scale() == [2.0**16] * M
    scaler.update(range(1, 5))
    assert scaler.get_scale() == [1.0, 2.0, 3.0, 4.0]
    for p in batch.parameters():
        p.grad = torch.ones_like(p)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        *(({"init_scale": value}, ValueError) for value in (0, -1.0, torch.nan, torch.inf)),
        *(({"init_scale": value}, TypeError) for value in ("1", None)),
        *(({"growth_factor": value}, ValueError) for value in (1.0, torch.nan, torch.inf)),
        *(({"backoff_factor": value}, ValueError) for value in (0.0, 1.0, torch.nan)),
        ({"growth_factor": "2"}, TypeError),
        ({"growth_interval": 0}, ValueError),
        ({"growth_interval": 2.5}, TypeError),
    ],
    ids=str,
)
def test_scales_with_which_nothing_trains_are_refused(settings, error):
    with pytest.raises(error, match="Expected"):
        GradScaler(**settings)


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, torch.nan, [1.0, 2.0, 0.0, 1.0], torch.tensor([1.0, 1.0, 1.0, torch.inf])]
)
def test_nor_can_they_be_set_or_loaded(scale):
    scaler = GradScaler(init_scale=8.0)
    scaler.scale(torch.ones(M))
    with pytest.raises(ValueError, match="Expected finite scales above 0"):
        scaler.update(scale)
    state = scaler.state_dict()
    with pytest.raises(ValueError, match="Expected finite scales above 0"):
        scaler.load_state_dict({**state, "growth_factor": 5.0, "scale": scale})
    with pytest.raises(ValueError, match=r"Expected one scale or 4"):
        scaler.load_state_dict({**state, "growth_factor": 5.0, "scale": 2.0, "_growth_tracker": [0]})
    assert scaler.state_dict() == state
