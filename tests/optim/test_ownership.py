"""An optimizer or a scheduler of another batch is refused by name, and what would mix the models is told."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from oracle import assert_same_parameters, batches, train_alone
from torch import nn, optim
from torch.optim import lr_scheduler as sched

from mbkit import GradScaler, ModelBatch, OptimizerFactory, fit, train_steps

MSE = nn.functional.mse_loss


def build(count: int = 4) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)).double() for _ in range(count)]


def start(cls: type = optim.SGD) -> tuple[ModelBatch, optim.Optimizer]:
    batch = ModelBatch(build())
    return batch, OptimizerFactory(cls).create_optimizer(batch, lr=0.1)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["of an older batch", "with views", "a lone one"])
def test_an_optimizer_of_another_batch_is_refused(kind, compile):
    """A notebook's cell that makes the batch is run again, the one below it is not."""
    _, old = start(optim.Rprop if kind == "with views" else optim.SGD)
    if kind == "a lone one":
        old = optim.SGD(build()[0].parameters(), lr=0.1)
    batch = ModelBatch(build())
    with pytest.raises(ValueError, match=r"Expected an optimizer of this batch's parameters, got (SGD|Rprop) over"):
        fit(batch, old, batches(own=False), MSE, compile=compile, progress=False)
    assert_same_parameters(batch.models, build(), 0)


def test_a_scaler_refuses_it_too():
    batch, _ = start()
    _, old = start()
    scaler = GradScaler()
    x, y = batches(own=False)[0]
    old.zero_grad()
    scaler.scale(batch.compute_loss(batch(x), y, MSE, reduction="none")).sum().backward()
    with pytest.raises(RuntimeError, match="Expected gradients for the optimizer's batch, got none: the losses"):
        scaler.step(old)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: sched.StepLR(optimizer, 1),
        lambda optimizer: OptimizerFactory.create_lr_scheduler(optimizer, sched.StepLR, {"step_size": 1}),
    ],
    ids=["one", "one per model"],
)
def test_a_scheduler_of_another_optimizer_is_refused(make):
    batch, optimizer = start()
    other = OptimizerFactory(optim.SGD).create_optimizer(batch, lr=0.1)
    with pytest.raises(ValueError, match=r"Expected a scheduler of this optimizer, got StepLR of another \w+"):
        fit(batch, optimizer, batches(own=False), MSE, scheduler=make(other), progress=False)
    with pytest.raises(ValueError, match="StepLR of another SGD"):
        fit(
            batch,
            optimizer,
            batches(own=False),
            MSE,
            scheduler=lambda _: sched.StepLR(optim.SGD(batch.parameters()), 1),
            progress=False,
        )
    assert_same_parameters(batch.models, build(), 0)
    optimizer.load_state_dict(optimizer.state_dict())  # which makes new groups
    fit(batch, optimizer, batches(own=False), MSE, scheduler=make(optimizer), progress=False)
    assert optimizer.param_groups[3]["lr"] < 0.05


def test_a_scheduler_of_one_model_is_the_optimizers_own():
    batch, optimizer = start()
    schedulers = OptimizerFactory.create_lr_scheduler(optimizer, sched.StepLR, {"step_size": 1})
    fit(batch, optimizer, batches(own=False), MSE, scheduler=schedulers[2], progress=False)
    assert [group["lr"] < 0.05 for group in optimizer.param_groups] == [False, False, True, False]


@pytest.mark.parametrize("per_model", [False, True])
def test_plateaus_are_told_the_right_call(per_model):
    batch, optimizer = start()
    with pytest.warns(UserWarning, match="lowers the rates of all 4 models together.* makes one for each"):
        scheduler = sched.ReduceLROnPlateau(optimizer)
    if per_model:
        scheduler = OptimizerFactory.create_lr_scheduler(optimizer, sched.ReduceLROnPlateau, {})
    with pytest.raises(TypeError, match=r"create_lr_scheduler\(optimizer, ReduceLROnPlateau, .*schedulers\.step\("):
        fit(batch, optimizer, batches(own=False), MSE, scheduler=scheduler, progress=False)


class Lamb(optim.SGD):
    """A name that people's own classes have."""


class OwnLamb(Lamb):
    """A subclass of one."""


OVER_TENSORS = [optim.Adafactor, Lamb, OwnLamb] + ([optim.Muon] if hasattr(optim, "Muon") else [])


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("cls", OVER_TENSORS)
def test_norms_over_whole_tensors_are_warned_of(cls, at_once):
    """Where it is made of `batch.parameters()`; or else, where the tensors come some other way, when it trains."""
    batch = ModelBatch([nn.Linear(3, 2, bias=False).double() for _ in range(4)])
    said = rf"{cls.__name__} takes norms or means .* OptimizerFactory\({cls.__name__}\)"
    if cls is getattr(optim, "Muon", None) or not at_once:
        plain = cls([nn.Parameter(batch.weight[0].detach().clone())], lr=0.1)  # Muon takes nothing but matrices
        plain.param_groups[0]["params"][:] = list(batch.parameters())
        with pytest.warns(UserWarning, match=said):
            train_steps(batch, plain, batches(own=False), MSE)
    else:
        with pytest.warns(UserWarning, match=said) as told:
            plain = cls(batch.parameters(), lr=0.1)
        assert told[0].filename == __file__
    train_steps(batch, plain, batches(own=False), MSE)  # it is said once


def test_torchs_functions_that_mix_the_models_are_warned_of():
    batch = ModelBatch(build())
    batch(torch.ones(2, 3).double()).sum().backward()
    for mixes, instead in (
        (lambda: nn.utils.clip_grad_norm_(batch.parameters(), 1.0), r"batch\.clip_grad_norm_\(max_norm\)"),
        (lambda: nn.utils.parameters_to_vector(batch.parameters()), r"for model in batch"),
    ):
        with pytest.warns(UserWarning, match=rf"all 4 models .*{instead}") as told:
            mixes()
        assert told[0].filename == __file__
    nn.utils.clip_grad_value_(batch.parameters(), 1.0)
    optim.Adam(batch.parameters())
    one = ModelBatch(build(1))
    one(torch.ones(2, 3).double()).sum().backward()
    nn.utils.clip_grad_norm_(one.parameters(), 1.0)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_noise_over_all_models_at_once_is_warned_of(noise):
    class Langevin(optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"] if noise else []:
                    p.add_(torch.randn_like(p), alpha=noise)

    batch = ModelBatch(build())
    optimizer = Langevin(batch.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(batch, optimizer, batches(own=False), MSE, progress=False)
    told = [str(warning.message) for warning in caught if "Langevin draws random numbers" in str(warning.message)]
    assert len(told) == (1 if noise else 0)


def test_the_factorys_optimizers_and_elementwise_ones_train_as_alone_without_a_word():
    data = batches(own=False)
    for cls, make in (
        (optim.Adafactor, lambda batch: OptimizerFactory(optim.Adafactor).create_optimizer(batch, lr=0.1)),
        (optim.Adam, lambda batch: optim.Adam(batch.parameters(), lr=0.1)),
    ):
        batch, alone = ModelBatch(build()), build()
        fit(batch, make(batch), data, MSE, progress=False)
        train_alone(alone, data, seeds=None, optimizer_cls=cls, configs={"lr": 0.1})
        assert_same_parameters(batch.models, alone, 1e-10)


def test_groups_chosen_by_dimensions():
    """`p.ndim < 2` tells biases and norms from weights: in the batch's groups by a function of the lone parameter."""
    data, models = batches(own=False), build()
    batch, alone = ModelBatch(models), copy.deepcopy(models)
    plain = [
        {"params": [p for p in batch.parameters() if p.ndim >= 2], "weight_decay": 0.5},
        {"params": [p for p in batch.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    with pytest.warns(UserWarning, match="AdamW has a group without parameters.* lambda name, p: p.ndim < 2"):
        train_steps(batch, optim.AdamW(plain, lr=0.1), data, MSE)
    groups = [{"params": lambda name, p: p.ndim < 2, "weight_decay": 0.0}, {"params": "*", "weight_decay": 0.5}]
    optimizer = OptimizerFactory(optim.AdamW).create_optimizer(batch, groups=groups, lr=0.1)
    fit(batch, optimizer, data, MSE, progress=False)
    for model in alone:
        split = [
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.5},
        ]
        lone = optim.AdamW(split, lr=0.1)
        for x, y in data:
            lone.zero_grad()
            MSE(model(x), y).backward()
            lone.step()
    assert_same_parameters(batch.models, alone, 1e-10)
