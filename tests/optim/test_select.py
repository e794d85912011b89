"""Some of the models go on in a smaller batch, or in a merged one, as in the wide one and as alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from optimizers import (
    CHOSEN,
    M,
    create,
    create_alone,
    every_class,
    grouped,
    largest_difference,
    select,
    shapes,
    start,
    step_alone,
    step_batch,
)
from safetensors.torch import load_file, save_file
from torch import nn, optim
from torch.optim import lr_scheduler as sched

from mbkit import GradScaler, ModelBatch
from mbkit.optim import OptimizerFactory, select_scheduler
from mbkit.optim.base import BatchOptimizer


@grouped
@every_class
def test_the_selected_go_on_as_in_the_wide_batch_and_alone(case: tuple[type, dict], in_groups: bool) -> None:
    cls, hyperparameters = case
    models, batch, optimizer = start(cls, hyperparameters, in_groups=in_groups)
    lones = [create_alone(cls, hyperparameters, models[m], m, in_groups) for m in CHOSEN]
    step_batch(optimizer, batch, range(5))
    optimizer.groups_of(1)[-1]["lr"] = 0.02
    small, chosen = select(batch, optimizer)
    step_batch(chosen, small, range(5, 10), CHOSEN)
    step_batch(optimizer, batch, range(5, 10))
    for i, (m, lone) in enumerate(zip(CHOSEN, lones, strict=True)):
        step_alone(lone, models[m], m, range(5))
        lone.param_groups[-1]["lr"] = optimizer.groups_of(m)[-1]["lr"]
        step_alone(lone, models[m], m, range(5, 10))
        for p, wide, own in zip(small.parameters(), batch.parameters(), models[m].parameters(), strict=True):
            assert torch.equal(p[i], wide[m])
            assert torch.equal(p[i], own)
    wide, own = optimizer.get_model_states(CHOSEN), chosen.get_model_states()
    assert [state.keys() for state in wide] == [state.keys() for state in own]
    for before, after in zip(wide, own, strict=True):
        for name, value in before.items():
            assert torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name], name


@pytest.mark.parametrize(("width", "flags"), [(8, False), (200, False), (200, [True, False, False, False, False])])
def test_the_kernel_that_updates_a_model_stays(width: int, flags: object) -> None:
    """Small models take Adam's fused kernel if they are few; large ones take it unless one of them has amsgrad."""
    torch.manual_seed(0)
    batch = ModelBatch([nn.Linear(100, width) for _ in range(5)])
    optimizer = OptimizerFactory(optim.AdamW).create_optimizer(batch, lr=0.01, amsgrad=flags)

    def both(*pairs: tuple[BatchOptimizer, ModelBatch, slice | list[int]]) -> None:
        grads = [torch.randn_like(p) for p in batch.parameters()]
        for its, one, models in pairs:
            for p, g in zip(one.parameters(), grads, strict=True):
                p.grad = g[models].clone()
            its.step()

    for _ in range(3):
        both((optimizer, batch, slice(None)))
    small = batch.select([4, 2])
    chosen = optimizer.select([4, 2], small)
    one = small.select(1)
    last = chosen.select([1], one)
    for _ in range(20):
        both((optimizer, batch, slice(None)), (chosen, small, [4, 2]), (last, one, [2]))
    for p, q, r in zip(batch.parameters(), small.parameters(), one.parameters(), strict=True):
        assert torch.equal(p[[4, 2]], q)
        assert torch.equal(p[2], r[0])


@pytest.mark.parametrize("way", ["merge", "files"])
@every_class
def test_models_of_several_batches_go_on_in_one(case: tuple[type, dict], way: str, tmp_path: Path) -> None:
    """One batch has made six steps, the other none; the order of the models changes."""
    cls, hyperparameters = case
    models = shapes(torch.float64)
    batches, optimizers = [], []
    for own, steps in (([2, 0], 6), ([3, 1], 0)):
        batches.append(ModelBatch([models[m] for m in own]))
        numbers = {k: [v[m] for m in own] if isinstance(v, list) else v for k, v in hyperparameters.items()}
        optimizers.append(create(cls, numbers, batches[-1]))
        step_batch(optimizers[-1], batches[-1], range(steps), own)
    merged = ModelBatch.merge(batches)
    if way == "merge":
        optimizer = BatchOptimizer.merge(optimizers, merged)
    else:
        states = [state for one in optimizers for state in one.get_model_states()]
        tensors = {f"{m}/{k}": v for m, own in enumerate(states) for k, v in own.items() if torch.is_tensor(v)}
        save_file(tensors, tmp_path / "states.safetensors")
        rest = json.dumps([{k: v for k, v in own.items() if not torch.is_tensor(v)} for own in states])
        tensors, states = load_file(tmp_path / "states.safetensors"), json.loads(rest)
        for m, own in enumerate(states):
            own |= {k.removeprefix(f"{m}/"): v for k, v in tensors.items() if k.startswith(f"{m}/")}
        numbers = {k: [v[m] for m in (2, 0, 3, 1)] if isinstance(v, list) else v for k, v in hyperparameters.items()}
        optimizer = create(cls, numbers, merged)
        for group in optimizer.param_groups:
            group["lr"] = 9.0
        optimizer.load_model_states(states)
    step_batch(optimizer, merged, range(6, 12), [2, 0, 3, 1])
    for m, steps in ((2, range(12)), (0, range(12)), (3, range(6, 12)), (1, range(6, 12))):
        step_alone(create_alone(cls, hyperparameters, models[m], m), models[m], m, steps)
    assert largest_difference(merged, [models[m] for m in (2, 0, 3, 1)]) <= 1e-12


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    _, batch, optimizer = start(optim.Adam, {"lr": [0.1, 0.2, 0.3, 0.4]})
    step_batch(optimizer, batch, range(2))
    small, chosen = select(batch, optimizer)
    before = chosen.get_model_states()
    with pytest.raises(IndexError, match="from 0 to 3, got 4"):
        optimizer.select([1, 4], small)
    with pytest.raises(ValueError, match=r"a batch of 3 models with scalar .*, got one of 2 models"):
        optimizer.select([0, 1, 2], small)
    with pytest.raises(ValueError, match=r"got one of 2 models with weight \(1, 2\)"):
        optimizer.select([0, 1], ModelBatch([nn.Linear(2, 1) for _ in range(2)]))
    with pytest.raises(ValueError, match="Expected optimizers of one class"):
        BatchOptimizer.merge([chosen, start(optim.SGD, {})[2]], ModelBatch([*small.models, *batch.models]))
    damages = {
        r"Expected 2 states \(one per model\), got 1": lambda states: states.pop(),
        "got 'state/other/exp_avg' of model 1": lambda states: states[1].update({"state/other/exp_avg": 1}),
        r"'exp_avg' of shape \(7, 11\), got one of shape \(3,\)": lambda states: states[1].update(
            {"state/weight/exp_avg": torch.ones(3)}
        ),
        r"'step' of shape \(\), got one that is a float for model 0": lambda states: states[0].update(
            {"state/weight/step": 3.0}
        ),
        "without lr": lambda states: states[1].pop("param_groups/0/lr"),
        "got 'param_groups/1/lr' of model 0": lambda states: states[0].update({"param_groups/1/lr": 0.1}),
    }
    for message, damage in damages.items():
        states = optimizer.get_model_states([0, 2])
        damage(states)
        with pytest.raises(ValueError, match=message):
            chosen.load_model_states(states)
        assert str(chosen.get_model_states()) == str(before)


# ---------------------------------------------------------------------- schedulers and scalers


def test_a_scheduler_that_was_not_stepped_yet_goes_on_without_a_word() -> None:
    _, batch, optimizer = start(optim.SGD, {"lr": 0.1})
    schedulers = [
        sched.StepLR(optimizer, 1),
        OptimizerFactory.create_lr_scheduler(optimizer, sched.StepLR, {"step_size": 1}),
    ]
    step_batch(optimizer, batch, range(1))
    _, chosen = select(batch, optimizer)
    for scheduler in schedulers:
        select_scheduler(scheduler, CHOSEN, chosen).step()
    assert [group["lr"] for group in chosen.param_groups] == pytest.approx([0.001] * 2)
    with pytest.raises(ValueError, match="Expected an optimizer of 3 models, got one of 2"):
        select_scheduler(schedulers[0], [0, 1, 2], chosen)


@pytest.mark.parametrize("begun", [False, True])
def test_a_scaler_goes_on(begun: bool) -> None:
    """Model 1 overflows in the third step, model 2 in the fifth."""
    settings = {"init_scale": 8.0, "growth_interval": 2}
    lone = [torch.amp.GradScaler("cpu", **settings) for _ in CHOSEN]
    batch = ModelBatch([nn.Linear(2, 1) for _ in range(M)])
    optimizer = OptimizerFactory(optim.SGD).create_optimizer(batch, lr=0.1)
    scaler, alone = GradScaler(**settings), [nn.Linear(2, 1) for _ in CHOSEN]
    optimizers = [optim.SGD(model.parameters(), lr=0.1) for model in alone]
    for t in range(8):
        if t == (3 if begun else 0):
            (batch, optimizer), scaler = select(batch, optimizer), scaler.select(CHOSEN)
        numbers = list(range(M)) if batch.num_models == M else CHOSEN
        bad = {(2, 1), (4, 3)}
        losses = batch(torch.ones(1, 2)).flatten(1).sum(1) * torch.tensor(
            [torch.inf if (t, m) in bad else 1.0 for m in numbers]
        )
        optimizer.zero_grad()
        scaler.scale(losses).sum().backward()
        scaler.step(optimizer)
        scaler.update()
        for m, model, its, one in zip(CHOSEN, alone, optimizers, lone, strict=True):
            its.zero_grad()
            one.scale(model(torch.ones(1, 2)).sum() * (torch.inf if (t, m) in bad else 1.0)).backward()
            one.step(its)
            one.update()
    assert scaler.get_scale() == [one.get_scale() for one in lone]
    assert scaler.state_dict()["_growth_tracker"] == [one.state_dict()["_growth_tracker"] for one in lone]
