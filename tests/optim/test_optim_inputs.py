"""The ways to say hyperparameters, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from optimizers import GlobalNorm, M, shapes
from torch import nn, optim

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory, create_adam_configs, create_lr_sweep_configs, create_sgd_configs

LR = [0.1, 0.03, 0.01, 0.003]

# ---------------------------------------------------------------------- the three ways to say hyperparameters


def test_configs_keywords_and_base_config_say_the_same() -> None:
    models = shapes(torch.float32)
    batches = [ModelBatch(models) for _ in range(4)]
    optimizers = [
        OptimizerFactory(optim.Adam).create_optimizer(batches[0], lr=LR, eps=1e-3, betas=(0.8, 0.9)),
        OptimizerFactory(optim.Adam).create_optimizer(
            batches[1], [{"lr": lr, "eps": 1e-3, "betas": [0.8, 0.9]} for lr in LR]
        ),
        OptimizerFactory(optim.Adam, {"eps": 1e-3, "lr": 9.0}).create_optimizer(
            batches[2], [{"lr": lr} for lr in LR], betas=[(0.8, 0.9)] * M
        ),
        OptimizerFactory(optim.Adam, {"eps": 1e-3}).create_optimizer(
            batches[3], lr=torch.tensor(LR, dtype=torch.float64), betas=np.tile([0.8, 0.9], (M, 1))
        ),
    ]
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    assert groups[0] == groups[1] == groups[2] == groups[3]
    lone = optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.03, eps=1e-3, betas=(0.8, 0.9)).param_groups[0]
    assert groups[0][1] == {k: v for k, v in lone.items() if k != "params"}


def test_what_is_not_said_is_the_default_of_the_class() -> None:
    optimizer = create(configs=[{"lr": 0.5}, {}, {"eps": 1e-3}])
    assert [(g["lr"], g["eps"]) for g in optimizer.param_groups] == [(0.5, 1e-8), (1e-3, 1e-8), (1e-3, 1e-3)]


def test_create_configs() -> None:
    assert create_sgd_configs((0.1, 0.2)) == [{"lr": lr, "momentum": 0.9, "weight_decay": 1e-4} for lr in (0.1, 0.2)]
    assert create_adam_configs(np.array([0.5]), eps=1e-3) == [
        {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0}
    ]
    assert [c["momentum"] for c in create_sgd_configs([0.1, 0.2], momentum=[0.5, 0.0])] == [0.5, 0.0]
    rates = [c["lr"] for c in create_lr_sweep_configs(1e-4, 3e-1, 7)]
    assert rates == pytest.approx([1e-4 * 3000 ** (m / 6) for m in range(7)])
    assert (rates[0], rates[-1]) == (1e-4, 3e-1)
    assert [c["lr"] for c in create_lr_sweep_configs(0.0, 1.0, 3, "linear")] == [0.0, 0.5, 1.0]
    assert create_lr_sweep_configs(0.1, 1.0, 1) == [{"lr": 0.1}]


# ---------------------------------------------------------------------- refusals


def create(cls=optim.Adam, base=None, configs=None, **keywords):
    batch = ModelBatch([nn.Linear(2, 1) for _ in range(3)])
    return OptimizerFactory(cls, base).create_optimizer(batch, configs, **keywords)


REFUSALS = [
    ({"lr": [0.1, 0.2]}, ValueError, r"Expected 3 learning rates \(one per model\), got 2: pass one value"),
    ({"configs": [{"lr": 0.1}] * 2}, ValueError, r"Expected 3 configs \(one per model\), got 2"),
    ({"configs": []}, ValueError, r"Expected 3 configs \(one per model\), got 0"),
    ({"configs": {"lr": 0.1}}, TypeError, "Expected a list of 3 configs .* got dict: .* as keywords"),
    ({"configs": [{"lr": 0.1}, 0.1, {}]}, TypeError, "Expected a dict as the config of model 1, got 0.1"),
    ({"configs": [{"lr": 0.1}, {}, {}], "lr": 0.2}, ValueError, "Got 'lr' both in configs and as a keyword"),
    ({"learning_rate": 0.1}, ValueError, "Adam has no argument 'learning_rate'"),
    ({"weight_decy": 0.1}, ValueError, "Adam has no argument 'weight_decy'. Did you mean 'weight_decay'?"),
    ({"configs": [{}, {"momentun": 0.1}, {}], "cls": optim.SGD}, ValueError, "of model 1. Did you mean 'momentum'?"),
    ({"base": {"momentun": 0.1}, "cls": optim.SGD}, ValueError, "in base_config. Did you mean 'momentum'?"),
    ({"base": [0.1]}, TypeError, "Expected a dict as base_config"),
    ({"configs": [{"params": []}] * 3}, ValueError, "Got 'params' in the config of model 0"),
    ({"base": {"params": []}}, ValueError, "Got 'params' in base_config"),
    ({"lr": [0.1, -0.1, 0.1]}, ValueError, "finite learning rate from 0 on, got -0.1 of model 1"),
    ({"lr": [0.1, 0.1, math.nan]}, ValueError, "finite learning rate from 0 on, got nan of model 2"),
    ({"lr": math.inf}, ValueError, "finite learning rate from 0 on, got inf of model 0"),
    ({"cls": GlobalNorm, "lr": -1.0}, ValueError, "finite learning rate from 0 on, got -1.0 of model 0"),
    ({"lr": "0.1"}, TypeError, "Expected a number as learning rate of model 0, got '0.1'"),
    (
        {"cls": optim.SGD, "momentum": [0.1, math.nan, 0.2]},
        ValueError,
        "Expected a number as 'momentum' of model 1, got nan",
    ),
    ({"betas": [(0.9, 0.9), (0.9, 1.5), (0.9, 0.9)]}, ValueError, "Adam refuses .* of model 1, .*: Invalid beta"),
    (
        {"cls": optim.ASGD, "weight_decay": [0, 0, -1]},
        ValueError,
        "ASGD refuses .* of model 2, .*: Invalid weight",
    ),
    ({"betas": [0.9, 0.8, 0.7]}, TypeError, r"Expected a tuple like \(0.9, 0.999\) as 'betas' of model 0, got 0.9"),
    ({"cls": optim.SGD, "nesterov": True}, ValueError, "of model 0, .*: Nesterov momentum requires a momentum"),
    ({"foreach": True}, ValueError, "Got foreach=True: it chooses how torch loops"),
    ({"base": {"fused": True}}, ValueError, "Got fused=True in base_config"),
    ({"configs": [{}, {"capturable": True}, {}]}, ValueError, "Got capturable=True in the config of model 1"),
    ({"cls": optim.ASGD, "differentiable": True}, ValueError, "Got differentiable=True"),
    ({"cls": optim.Optimizer}, TypeError, "Expected the class that trains one model alone"),
    ({"cls": "Adam"}, TypeError, "Expected a class of torch.optim, such as torch.optim.Adam, got 'Adam'"),
    ({"cls": nn.Linear}, TypeError, "Expected a class of torch.optim"),
    ({"cls": optim.SGD([nn.Parameter(torch.ones(1))])}, TypeError, "Expected a class of torch.optim"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSALS, ids=[r[2][:40] for r in REFUSALS])
def test_refusals(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        create(**arguments)


def test_what_is_off_may_be_said() -> None:
    optimizer = create(foreach=False, fused=None, capturable=False, lr=0.1)
    assert optimizer.param_groups[2]["lr"] == 0.1


def test_a_batch_is_needed_and_must_have_parameters() -> None:
    with pytest.raises(TypeError, match=r"Expected a ModelBatch, got Linear: wrap the models first"):
        OptimizerFactory(optim.Adam).create_optimizer(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="Expected models with parameters"):
        OptimizerFactory(optim.Adam).create_optimizer(ModelBatch([nn.ReLU()]))


def test_no_group_can_be_added() -> None:
    with pytest.raises(RuntimeError, match=r"Expected 3 groups \(of 3 models\)"):
        create().add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_replaced_parameters_are_noticed() -> None:
    batch = ModelBatch([nn.Linear(2, 1) for _ in range(2)])
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch)
    batch.weight = nn.Parameter(batch.weight.detach().clone())
    batch(torch.ones(1, 2)).sum().backward()
    optimizer.param_groups[0]["params"][1].grad = None
    with pytest.raises(RuntimeError, match="create a new optimizer"):
        optimizer.step()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_lr_sweep_configs(0.1, 0.01, 3), "min_lr <= max_lr, got 0.1 and 0.01"),
        (lambda: create_lr_sweep_configs(0.0, 0.1, 3), "above 0 on a log scale, got 0.0"),
        (lambda: create_lr_sweep_configs(0.01, 0.1, 0), "Expected at least 1 as num_models, got 0"),
        (lambda: create_lr_sweep_configs(0.01, 0.1, 3, "lin"), "got 'lin'. Did you mean 'linear'?"),
        (lambda: create_lr_sweep_configs(0.01, math.inf, 3), "finite learning rate from 0 on, got inf"),
        (lambda: create_sgd_configs([]), "at least one learning rate"),
        (lambda: create_sgd_configs([0.1, math.nan]), "got nan of model 1"),
        (lambda: create_adam_configs([0.1, -0.2]), "got -0.2 of model 1"),
        (
            lambda: create_sgd_configs([0.1, 0.2], momentum=[0.1]),
            r"Expected 2 values of 'momentum' \(one per model\), got 1",
        ),
    ],
)
def test_config_helpers_refuse(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_config_helpers_want_lists() -> None:
    with pytest.raises(TypeError, match="Expected a list of learning rates"):
        create_sgd_configs(0.1)
