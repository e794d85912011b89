"""Hyperparameters per model and per parameter group, against M lone torch.optim with the same param groups."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from optimizers import (
    GlobalNorm,
    M,
    config_of,
    every_class,
    gradients,
    largest_difference,
    same,
    shapes,
    step_alone,
    step_batch,
)
from torch import nn, optim

from mbkit import MLP, ModelBatch
from mbkit.optim import OptimizerFactory

RATES = [0.02, 0.01, 0.05, 0.0]
FOR_ALL = ("norm_type", "initial_accumulator_value")  # the classes read these from the keywords, not from the groups
FIRST = ("scalar", "weight")  # not in the order of the model, and not neighbors


def named(hyperparameters: dict) -> list[dict]:
    return [{"params": ["weight", "scalar"], **hyperparameters}, {"params": "*", "lr": RATES}]


def start(cls: type, hyperparameters: dict, dtype: torch.dtype = torch.float32):
    models = shapes(dtype)
    batch = ModelBatch(models)
    both = {name: value for name, value in hyperparameters.items() if name in FOR_ALL}
    own = {name: value for name, value in hyperparameters.items() if name not in FOR_ALL}
    optimizer = OptimizerFactory(cls).create_optimizer(batch, groups=named(own), lr=0.01, **both)
    return models, batch, optimizer


def alone(cls: type, hyperparameters: dict, model: nn.Module, m: int) -> optim.Optimizer:
    config = config_of(hyperparameters, m)
    rest = {name: config.pop(name) for name in FOR_ALL if name in config}
    params = dict(model.named_parameters())
    groups = [
        {"params": [params.pop(name) for name in FIRST], **config},
        {"params": list(params.values()), "lr": RATES[m]},
    ]
    if "foreach" in cls.__init__.__code__.co_varnames:
        rest["foreach"] = False
    return cls(groups, lr=0.01, **rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_class
def test_equals_lone_optimizers_with_the_same_groups(case: tuple[type, dict], dtype: torch.dtype) -> None:
    models, batch, optimizer = start(*case, dtype)
    step_batch(optimizer, batch, range(15))
    assert largest_difference(batch, models) > 1e-3
    for m, model in enumerate(models):
        step_alone(alone(*case, model, m), model, m, range(15))
    assert largest_difference(batch, models) <= (0 if dtype == torch.float32 else 1e-12)


@every_class
def test_unstacked_goes_on_alone_with_its_groups(case: tuple[type, dict]) -> None:
    models, batch, optimizer = start(*case)
    step_batch(optimizer, batch, range(5))
    optimizer.groups_of(2)[1]["lr"] = 0.25
    lone = optimizer.unstack(2 - M)
    assert [group["lr"] for group in lone.param_groups] == [group["lr"] for group in optimizer.groups_of(2)]
    step_alone(lone, lone.model, 2, range(5, 6))  # no gradient is missing in this step
    for p, g in zip(lone.model.parameters(), gradients(torch.float32, 5), strict=True):
        assert g is not None
        assert p.grad is not None
    step_batch(optimizer, batch, range(5, 6))
    for own, p in zip(lone.model.parameters(), batch.parameters(), strict=True):
        assert torch.equal(own, p[2])
    assert len(models) == M


@pytest.mark.parametrize("how", ["state_dict", "copy", "pickle"])
@every_class
def test_state_and_copies_keep_the_groups(case: tuple[type, dict], how: str) -> None:
    _, batch, optimizer = start(*case)
    step_batch(optimizer, batch, range(5))
    optimizer.param_groups[3]["lr"] = 0.25
    if how == "state_dict":
        other = ModelBatch(batch.models)
        resumed = start(*case)[2]
        resumed = type(resumed)(other, case[0], resumed._configs, resumed._names)
        resumed.load_state_dict(optimizer.state_dict())
    else:
        copied = copy.deepcopy if how == "copy" else lambda pair: pickle.loads(pickle.dumps(pair))
        other, resumed = copied((batch, optimizer))
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
    step_batch(resumed, other, range(5, 10))
    assert not same(batch, other)
    step_batch(optimizer, batch, range(5, 10))
    assert same(batch, other)


def test_schedulers_move_every_group_of_every_model_or_one_models_own() -> None:
    _, _, optimizer = start(optim.SGD, {"lr": [1.0, 2.0, 3.0, 4.0]})
    rates = [lr for pair in zip([1.0, 2.0, 3.0, 4.0], RATES, strict=True) for lr in pair]
    assert [group["lr"] for group in optimizer.param_groups] == rates
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 2 for lr in rates]

    _, _, optimizer = start(optim.SGD, {"lr": [1.0, 2.0, 3.0, 4.0]})
    configs = [{"lr_lambda": [lambda _, m=m: m, lambda _: 1.0]} for m in range(M)]
    schedulers = OptimizerFactory.create_lr_scheduler(optimizer, optim.lr_scheduler.LambdaLR, configs)
    moved = [lr * factor for m in range(M) for lr, factor in zip(rates[2 * m : 2 * m + 2], (m, 1), strict=True)]
    assert schedulers.get_last_lr() == moved == [group["lr"] for group in optimizer.param_groups]


def test_a_group_is_a_module_a_pattern_or_a_list_and_takes_what_earlier_ones_left() -> None:
    batch = ModelBatch([MLP((4, 3, 3, 2)) for _ in range(2)])
    factory = OptimizerFactory(optim.AdamW, {"weight_decay": 0.3})
    groups = [
        {"params": "*.bias", "weight_decay": 0.0},
        {"params": ["layers.0", "layers.1.weight"], "lr": [0.1, 0.2]},
        {"params": "*"},
    ]
    optimizer = factory.create_optimizer(batch, groups=groups, lr=[1.0, 2.0])
    names = {id(p): name for name, p in batch.named_parameters()}
    held = [[names[id(p)] for p in group["params"]] for group in optimizer.groups_of(0)]
    assert held == [
        ["layers.0.bias", "layers.1.bias", "layers.2.bias"],
        ["layers.0.weight", "layers.1.weight"],
        ["layers.2.weight"],
    ]
    numbers = [[(group["lr"], group["weight_decay"]) for group in optimizer.groups_of(m)] for m in range(2)]
    assert numbers == [[(1.0, 0.0), (0.1, 0.3), (1.0, 0.3)], [(2.0, 0.0), (0.2, 0.3), (2.0, 0.3)]]
    assert optimizer.num_models == 2


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({"params": "*"}, TypeError, "Expected a list of dicts as groups"),
        ([], TypeError, "Expected a list of dicts as groups"),
        ([{"lr": 0.1}], TypeError, "Expected names as 'params' of group 0, got None"),
        ([{"params": [torch.zeros(1)]}], TypeError, "such as 'layers.0.weight'"),
        ([{"params": "layers.0.wieght"}], ValueError, "Did you mean 'layers.0.weight'"),
        ([{"params": "*"}, {"params": "layers.1"}], ValueError, "Group 1 .layers.1. is left without parameters"),
        (
            [{"params": "layers.0"}],
            ValueError,
            "No group names layers.1.weight, layers.1.bias: ",
        ),
        ([{"params": "*", "lr": [0.1, 0.2, 0.3]}], ValueError, "Expected 2 learning rates"),
        ([{"params": "*", "lr": [0.1, -0.2]}], ValueError, "got -0.2 of model 1"),
        ([{"params": "*", "momentun": 0.1}], ValueError, "Did you mean 'momentum'"),
        ([{"params": "layers.0"}, {"params": "*", "momentum": [0.1, -1.0]}], ValueError, "of model 1.*momentum"),
    ],
)
def test_what_is_refused(groups: object, error: type, message: str) -> None:
    batch = ModelBatch([MLP((4, 3, 2)) for _ in range(2)])
    for cls in (optim.SGD, type("OwnSGD", (optim.SGD,), {})):
        with pytest.raises(error, match=message):
            OptimizerFactory(cls).create_optimizer(batch, groups=groups, lr=0.1)


def test_what_a_class_keeps_for_all_groups_cannot_differ_between_them() -> None:
    groups = [{"params": "layers.0", "norm_type": 1.0}, {"params": "*"}]
    batch = ModelBatch([MLP((4, 3, 2)) for _ in range(2)])
    with pytest.raises(ValueError, match=r"one 'norm_type' for all groups of model 0, got 1\.0 and 2\.0"):
        OptimizerFactory(GlobalNorm).create_optimizer(batch, groups=groups, lr=0.1, norm_type=2.0)


def test_a_state_with_other_groups_is_refused() -> None:
    _, batch, optimizer = start(optim.SGD, {"lr": 0.1})
    with pytest.raises(ValueError, match="4 models with 2 groups of parameters each, got one of 4 groups"):
        optimizer.load_state_dict(OptimizerFactory(optim.SGD).create_optimizer(batch).state_dict())
