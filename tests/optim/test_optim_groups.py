"""Hyperparameters per model and per parameter group, against M lone torch.optim with the same param groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import REST, GlobalNorm, M, create_alone, every_class, largest_difference, start, step_alone, step_batch
from oracle import assert_same_parameters, batches, build
from torch import Tensor, nn, optim

from mbkit import MLP, ModelBatch, fit
from mbkit.optim import OptimizerFactory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_class
def test_equals_lone_optimizers_with_the_same_groups(case: tuple[type, dict], dtype: torch.dtype) -> None:
    models, batch, optimizer = start(*case, dtype, in_groups=True)
    step_batch(optimizer, batch, range(15))
    assert largest_difference(batch, models) > 1e-3
    for m, model in enumerate(models):
        step_alone(create_alone(*case, model, m, in_groups=True), model, m, range(15))
    assert largest_difference(batch, models) <= (0 if dtype == torch.float32 else 1e-12)


def test_schedulers_move_every_group_of_every_model_or_one_models_own() -> None:
    _, _, optimizer = start(optim.SGD, {"lr": [1.0, 2.0, 3.0, 4.0]}, in_groups=True)
    rates = [lr for pair in zip([1.0, 2.0, 3.0, 4.0], REST, strict=True) for lr in pair]
    assert [group["lr"] for group in optimizer.param_groups] == rates
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 2 for lr in rates]

    _, _, optimizer = start(optim.SGD, {"lr": [1.0, 2.0, 3.0, 4.0]}, in_groups=True)
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
    _, batch, optimizer = start(optim.SGD, {"lr": 0.1}, in_groups=True)
    with pytest.raises(ValueError, match=r"4 models with 2 group\(s\) of parameters each, got one of 4 groups"):
        optimizer.load_state_dict(OptimizerFactory(optim.SGD).create_optimizer(batch).state_dict())


# ---------------------------------------------------------------------- an optimizer over a part


class Gan(nn.Module):
    """A generator and a discriminator as one module; the input says which of the two losses is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, noise: Tensor, real: Tensor | None = None) -> Tensor:
        fake = self.generator(noise)
        if real is None:
            return -self.discriminator(fake).mean()
        return self.discriminator(fake.detach()).mean() - self.discriminator(real).mean()


def play(model: Any, critic: Any, maker: Any, noise: Tensor, real: Tensor) -> None:
    """A step of each: the generator's loss leaves gradients in the discriminator, which must not stay there."""
    critic.zero_grad()
    model(noise, real).sum().backward()
    critic.step()
    maker.zero_grad()
    model(noise).sum().backward()
    maker.step()


@pytest.mark.parametrize("cls", [optim.Adam, optim.Rprop, optim.Adafactor])
@pytest.mark.parametrize(
    "part", ["discriminator", "discriminator.*", ["discriminator.0", lambda name, p: "discriminator" in name]]
)
def test_a_gan_is_one_module_with_two_optimizers(cls: type, part: Any) -> None:
    torch.manual_seed(0)
    models = [Gan().double() for _ in range(3)]
    batch, rates, factory = ModelBatch(models), [0.1, 0.01, 0.03], OptimizerFactory(cls)
    optimizers = [factory.create_optimizer(batch, params=own, lr=rates) for own in (part, "generator")]
    data = [(torch.randn(6, 2).double(), torch.randn(6, 3).double()) for _ in range(5)]
    for noise, real in data:
        play(batch, *optimizers, noise, real)
    optimizers[1].zero_grad()
    cleared = {name: p.grad is None for name, p in batch.named_parameters()}
    assert cleared == {name: name.startswith("generator") for name in cleared}
    for model, lr in zip(models, rates, strict=True):
        lone = [cls(own.parameters(), lr=lr) for own in (model.discriminator, model.generator)]
        for noise, real in data:
            play(model, *lone, noise, real)
    assert_same_parameters(batch.models, models)
    lone = optimizers[0].unstack(1)
    held = lone.param_groups[0]["params"]
    assert all(p is q for p, q in zip(held, lone.model.discriminator.parameters(), strict=True))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_fit_trains_the_part_and_clips_by_each_steps_own_gradients(chunk_size: int | None) -> None:
    data = batches(own=False)
    lone = build("mlp")
    batch, before = ModelBatch(lone), ModelBatch(lone)
    optimizer = OptimizerFactory(optim.SGD).create_optimizer(batch, params="2", lr=0.1)
    with pytest.raises(ValueError, match="No parameter is called '3'"):
        OptimizerFactory(optim.SGD).create_optimizer(batch, params="3")
    with pytest.raises(ValueError, match="Expected parameters to train, got none by <lambda>"):
        OptimizerFactory(optim.SGD).create_optimizer(batch, params=lambda name, p: False)
    fit(batch, optimizer, data, nn.functional.mse_loss, max_norm=0.1, chunk_size=chunk_size, progress=False)
    for model in lone:
        one = optim.SGD(model[2].parameters(), lr=0.1)
        for x, y in data:
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            one.step()
    assert_same_parameters(batch.models, lone)
    assert torch.equal(batch.stacked_params["0.weight"], before.stacked_params["0.weight"])
    small = batch.select([2, 0])
    assert optimizer.select([2, 0], small).parameter_names == ["2.weight", "2.bias"]
