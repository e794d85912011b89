"""torch's learning rate schedulers: one over all models, and one a model, against M lone runs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from optimizers import CHOSEN, M, largest_difference, select, shapes, step_alone, step_batch
from torch import nn, optim
from torch.optim import lr_scheduler as sched

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory, select_scheduler

LR = [0.1, 0.03, 0.01, 0.003]
EPOCHS = 12
# Up to torch 2.8 SequentialLR calls step(0) at a milestone, and torch warns of its own call, alone as over a batch.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")


def sequential(optimizer: optim.Optimizer) -> sched.LRScheduler:
    parts = [sched.LinearLR(optimizer, 0.1, total_iters=3), sched.ExponentialLR(optimizer, 0.7)]
    return sched.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer: optim.Optimizer) -> sched.LRScheduler:
    return sched.ChainedScheduler([sched.ConstantLR(optimizer, 0.2, 4), sched.ExponentialLR(optimizer, 0.9)])


# Name: how to make it for any optimizer.
SCHEDULERS = {
    "StepLR": lambda o: sched.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: sched.ConstantLR(o, 0.25, 3),
    "LinearLR": lambda o: sched.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: sched.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 6, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 3, 2),
    "LambdaLR": lambda o: sched.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, lambda epoch: 0.95),
    "CyclicLR": lambda o: sched.CyclicLR(o, 1e-4, 0.1, 3, mode="triangular2"),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, 0.2, total_steps=EPOCHS + 2),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
}
METRICS = [1.0, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7, 0.7, 0.7]


def step(scheduler: sched.LRScheduler, epoch: int, m: int = 0) -> None:
    plateau = isinstance(scheduler, sched.ReduceLROnPlateau)
    scheduler.step(METRICS[(epoch + m) % EPOCHS]) if plateau else scheduler.step()


def start(cls: type, **hyperparameters) -> tuple[list[nn.Module], ModelBatch, optim.Optimizer, list[optim.Optimizer]]:
    models = shapes(torch.float32)
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(cls, hyperparameters).create_optimizer(batch, lr=LR)
    lone = [cls(model.parameters(), lr=lr, **hyperparameters) for model, lr in zip(models, LR, strict=True)]
    return models, batch, optimizer, lone


def same_numbers(optimizer: optim.Optimizer, lone: list[optim.Optimizer]) -> bool:
    names = ("lr", "momentum", "betas")
    return all(
        group.get(name) == one.param_groups[0].get(name)
        for group, one in zip(optimizer.param_groups, lone, strict=True)
        for name in names
    )


# CyclicLR and OneCycleLR cycle a momentum, which Rprop has not.
ON = [
    (n, cls)
    for n in SCHEDULERS
    for cls in (optim.SGD, optim.Adam, optim.Rprop)
    if "Cyc" not in n or cls is not optim.Rprop
]


@pytest.mark.parametrize("selected", [False, True], ids=["all", "then two"])
@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau gets one number")
@pytest.mark.parametrize(("name", "cls"), ON)
def test_one_scheduler_over_all_models(name: str, cls: type, selected: bool) -> None:
    make, rates, numbers = SCHEDULERS[name], set(), list(range(M))
    models, batch, optimizer, lone = start(cls, **({"momentum": 0.9} if cls is optim.SGD else {}))
    scheduler, alone = make(optimizer), [make(one) for one in lone]
    for epoch in range(EPOCHS):
        if selected and epoch == EPOCHS // 2:
            numbers, (batch, optimizer) = CHOSEN, select(batch, optimizer)
            scheduler = select_scheduler(scheduler, CHOSEN, optimizer)
        steps = range(epoch, epoch + 1)
        step_batch(optimizer, batch, steps, numbers)
        step(scheduler, epoch)
        for m in numbers:
            step_alone(lone[m], models[m], m, steps)
            step(alone[m], epoch)
        assert same_numbers(optimizer, [lone[m] for m in numbers])
        assert scheduler.get_last_lr() == [alone[m].get_last_lr()[0] for m in numbers]
        rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) > 1
    assert largest_difference(batch, [models[m] for m in numbers]) == 0


def test_a_list_of_lambdas_is_one_a_model() -> None:
    models, batch, optimizer, lone = start(optim.Adam)
    lambdas = [lambda epoch, m=m: (0.5 + 0.1 * m) ** epoch for m in range(M)]
    scheduler = sched.LambdaLR(optimizer, lambdas)
    alone = [sched.LambdaLR(one, f) for one, f in zip(lone, lambdas, strict=True)]
    for epoch in range(5):
        step_batch(optimizer, batch, range(epoch, epoch + 1))
        scheduler.step()
        for m in range(M):
            step_alone(lone[m], models[m], m, range(epoch, epoch + 1))
            alone[m].step()
    assert same_numbers(optimizer, lone)
    assert largest_difference(batch, models) == 0


# One config a model, each another schedule.
CONFIGS = {
    sched.StepLR: [{"step_size": m + 1, "gamma": 0.5 + 0.1 * m} for m in range(M)],
    sched.OneCycleLR: [{"max_lr": 0.1 + m, "total_steps": EPOCHS + 2, "pct_start": 0.2 + 0.1 * m} for m in range(M)],
    sched.CosineAnnealingWarmRestarts: [{"T_0": m + 2} for m in range(M)],
    sched.ReduceLROnPlateau: [{"patience": m, "factor": 0.5} for m in range(M)],
    sched.LambdaLR: [{"lr_lambda": lambda epoch, m=m: 1 / (1 + m * epoch)} for m in range(M)],
}


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("how", ["at once", "in a loop", "then two"])
def test_one_scheduler_a_model(cls: type, how: str) -> None:
    numbers = list(range(M))
    models, batch, optimizer, lone = start(optim.SGD, momentum=0.9)
    schedulers = OptimizerFactory.create_lr_scheduler(optimizer, cls, CONFIGS[cls])
    alone = [cls(one, **config) for one, config in zip(lone, CONFIGS[cls], strict=True)]
    for epoch in range(EPOCHS):
        if how == "then two" and epoch == EPOCHS // 2:
            numbers, (batch, optimizer) = CHOSEN, select(batch, optimizer)
            schedulers = schedulers.select(CHOSEN, optimizer)
        step_batch(optimizer, batch, range(epoch, epoch + 1), numbers)
        metrics = torch.tensor([METRICS[(epoch + m) % EPOCHS] for m in numbers], dtype=torch.float64)
        if how == "in a loop":
            for m, one in enumerate(schedulers):
                step(one, epoch, m)
        else:
            schedulers.step(metrics) if cls is sched.ReduceLROnPlateau else schedulers.step()
        for m in numbers:
            step_alone(lone[m], models[m], m, range(epoch, epoch + 1))
            step(alone[m], epoch, m)
        assert same_numbers(optimizer, [lone[m] for m in numbers])
        assert schedulers.get_last_lr() == [alone[m].get_last_lr()[0] for m in numbers]
    assert largest_difference(batch, [models[m] for m in numbers]) == 0


@pytest.mark.parametrize("make", [sequential, chained])
def test_a_function_makes_composed_schedulers(make) -> None:
    _, batch, optimizer, lone = start(optim.SGD)
    schedulers = OptimizerFactory.create_lr_scheduler(optimizer, make, {})
    alone = [make(one) for one in lone]
    for epoch in range(6):
        step_batch(optimizer, batch, range(epoch, epoch + 1))
        schedulers.step()
        for one, scheduler in zip(lone, alone, strict=True):
            one.step()
            scheduler.step()
        assert same_numbers(optimizer, lone)


@pytest.mark.parametrize("cls", [optim.Adam, optim.ASGD])
def test_schedulers_follow_the_optimizer_through_loading(cls: type) -> None:
    models = shapes(torch.float32)
    rates = []
    for resumed in (False, True):
        batch = ModelBatch(models)
        optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=LR)
        schedulers = OptimizerFactory.create_lr_scheduler(optimizer, sched.StepLR, CONFIGS[sched.StepLR])
        for epoch in range(8):
            if resumed and epoch == 4:
                states = copy.deepcopy((optimizer.state_dict(), schedulers.state_dict()))
                optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=0.5)
                schedulers = OptimizerFactory.create_lr_scheduler(optimizer, sched.StepLR, CONFIGS[sched.StepLR])
                optimizer.load_state_dict(states[0])
                schedulers.load_state_dict(states[1])
            step_batch(optimizer, batch, range(epoch, epoch + 1))
            schedulers.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == rates[1]
    assert rates[0] == pytest.approx([lr * (0.5 + 0.1 * m) ** (8 // (m + 1)) for m, lr in enumerate(LR)])


def test_the_order_of_calls_is_watched_as_by_torch() -> None:
    _, batch, optimizer, _ = start(optim.SGD)
    early = OptimizerFactory.create_lr_scheduler(optimizer, sched.ExponentialLR, {"gamma": 0.5})
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        early.step()
    schedulers = OptimizerFactory.create_lr_scheduler(optimizer, sched.ExponentialLR, {"gamma": 0.5})
    step_batch(optimizer, batch, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers.step()


def test_refusals() -> None:
    _, _, optimizer, lone = start(optim.SGD)
    create = OptimizerFactory.create_lr_scheduler
    with pytest.raises(ValueError, match=r"Expected 4 configs \(one per model\), got 2"):
        create(optimizer, sched.StepLR, [{"step_size": 1}] * 2)
    with pytest.raises(ValueError, match=r"'gama' in the config of model 1\. Did you mean 'gamma'"):
        create(optimizer, sched.StepLR, [{"step_size": 1}, {"step_size": 1, "gama": 1}, {}, {}])
    with pytest.raises(TypeError, match="Expected an optimizer from create_optimizer, got SGD"):
        create(lone[0], sched.StepLR, {"step_size": 1})
    with pytest.raises(TypeError, match="Expected a scheduler class, got 'StepLR'"):
        create(optimizer, "StepLR", {"step_size": 1})
    schedulers = create(optimizer, sched.ReduceLROnPlateau, {})
    with pytest.raises(ValueError, match=r"Expected 4 metrics \(one per model\), got 3"):
        schedulers.step([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="states of 4 schedulers"):
        schedulers.load_state_dict({"schedulers": []})
    with pytest.raises(RuntimeError, match=r"call step\(\) on the batch's optimizer"):
        schedulers[1].optimizer.step()
