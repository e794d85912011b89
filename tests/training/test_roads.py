"""Whatever a forward and a loss do besides computing, each model is the one trained alone, on every road alike.

What is expected comes from plain PyTorch alone: each model trains by itself, with a loss function of its own.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import UserDict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from mbkit import BatchingError, History, ModelBatch, OptimizerFactory, evaluate, fit
from tests.oracle import (
    MOMENTUM,
    SEEDS,
    Identity,
    assert_same_parameters,
    batches,
    snapshot,
    train_alone,
    trained_alone,
)

B, STEPS = 6, 4
ROADS = {
    "by itself": {},
    "at once": {"chunk_size": None},
    "in chunks": {"chunk_size": 2},
    "one by one": {"chunk_size": 1},
    "model by model": {"model_by_model": [""]},
    "compiled": {"compile": True},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).tanh())


class Momentum(Net):
    """An encoder that follows another one, written as MoCo writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.follows = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.follows.bias.data = self.follows.bias.data * 0.9 + self.out.bias.data * 0.1
        return super().forward(x) + self.follows(x)


class Jacobian(Net):
    """Returns its derivative by torch.func."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(lambda z: super(Jacobian, self).forward(z)[0]))(x)


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


HABITS = {"data assigned": Momentum, "torch.func": Jacobian, "a count in forward": Counts, "own inputs, mapped": Net}


def optimizer_of(batch: ModelBatch) -> Any:
    return OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)


def check(
    models: list[nn.Module], pairs: list, loss_of: Callable[[int], Any], loss_fn: Any, road: str, each: bool = False,
    **settings: Any,
) -> History:  # fmt: skip
    """Train a batch on a road and each model alone with a loss of its own, and compare.

    In float64, to 1e-10 of the largest number: rounding in another order is a hundred times smaller.
    """
    lones, how, numbers = copy.deepcopy(models), dict(ROADS[road]), range(len(models))
    for m, lone in enumerate(lones):
        own = [(x[m], y[m]) for x, y in pairs] if each else pairs
        train_alone([lone], own, loss_fn=loss_of(m), seeds=[m], configs={"lr": 0.1})
    batch = ModelBatch(models, not each, seeds=numbers, model_by_model=how.pop("model_by_model", []))
    data = [(UserDict(x=x), y) if each else (x, y) for x, y in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is slow or cannot be compiled
        history = fit(batch, optimizer_of(batch), data, loss_fn, progress=False, **settings, **how)
    assert_same_parameters(batch.models, lones)
    return history


def pairs_of(*lead: int) -> list[tuple[Tensor, ...]]:
    return [tuple(torch.randn(*lead, B, 4, dtype=torch.float64) for _ in "xy") for _ in range(STEPS)]


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("num_models", [1, 3, 5])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("habit", HABITS)
def test_every_road_gives_the_model_trained_alone(habit, road, num_models):
    models, each = [HABITS[habit]().double() for _ in range(num_models)], habit == "own inputs, mapped"
    check(models, pairs_of(num_models) if each else pairs_of(), lambda m: mse_loss, mse_loss, road, each)


def weighted(out: Tensor, y: Tensor, beta: float, weight: Tensor, scale: float = 1.0, power: float = 2.0) -> Tensor:
    loss = nn.functional.cross_entropy(out * scale, y.argmax(1), weight=weight)
    return loss + (1 - beta) * out.abs().pow(power).mean()


def smoothed(out: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    return nn.functional.cross_entropy(out, y.argmax(1), label_smoothing=label_smoothing)


def logarithmic(out: Tensor, y: Tensor, beta: float) -> Tensor:
    return mse_loss(out, y) * (1 + math.log(1 + beta))


def weights(m: int) -> Tensor:
    return torch.arange(1, 5).double() + m


SETTINGS: dict[str, tuple[Any, Any, bool]] = {  # the loss, model m's settings, whether a step can be compiled
    "numbers and tensors": (weighted, lambda m: {"beta": 0.1 + 0.2 * m, "weight": weights(m), "scale": 0.5}, True),
    "one for all": (weighted, lambda m: {"beta": 0.3, "weight": weights(0), "power": 3.0}, True),
    "label smoothing": (smoothed, lambda m: {"label_smoothing": 0.2 * m}, True),
    "of an operator": (nn.functional.huber_loss, lambda m: {"delta": 0.2 + 0.2 * m}, False),
    "outside torch": (logarithmic, lambda m: {"beta": 0.1 + 0.2 * m}, False),
}


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("num_models", [1, 3, 5])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_of_the_loss_are_each_models_own_on_every_road(kind, road, num_models):
    loss_fn, settings, compiles = SETTINGS[kind]
    models, given = [Net().double() for _ in range(num_models)], settings(0)
    if kind != "one for all":
        each = given.keys() - {"scale"}
        given |= {name: [settings(m)[name] for m in range(num_models)] for name in each}
    loss_of = lambda m: partial(loss_fn, **settings(m))  # noqa: E731
    history = check(models, pairs_of(), loss_of, loss_fn, road, loss_settings=given)
    if road == "compiled":
        assert (history.how == "compiled") == (compiles or num_models == 1)


def test_settings_that_the_loss_does_not_take_are_refused_before_anything_is_trained():
    batch = ModelBatch([Net() for _ in range(2)])
    before = snapshot(batch)["tensors"]
    with pytest.raises(ValueError, match=r"got 'betta'.*'beta'"):
        fit(batch, optimizer_of(batch), [(torch.randn(B, 4), torch.randn(B, 4))], weighted, loss_settings={"betta": 1})
    torch.testing.assert_close(snapshot(batch)["tensors"], before, rtol=0, atol=0)


@pytest.mark.parametrize("answer", [False, numpy.False_, torch.tensor(False), numpy.array(False)])
def test_a_callback_ends_the_training_by_any_kind_of_false(answer):
    batch = ModelBatch([nn.Linear(3, 2) for _ in range(2)])
    pairs = [(torch.randn(B, 3), torch.randn(B, 2))] * 4
    history = fit(batch, optimizer_of(batch), pairs, mse_loss, callback=lambda step: answer, progress=False)
    assert history.steps == 1


@pytest.mark.parametrize("answer", [None, 0, torch.tensor(True), numpy.True_])
def test_any_other_answer_of_a_callback_lets_it_go_on(answer):
    batch = ModelBatch([nn.Linear(3, 2) for _ in range(2)])
    pairs = [(torch.randn(B, 3), torch.randn(B, 2))] * 4
    assert fit(batch, optimizer_of(batch), pairs, mse_loss, callback=lambda step: answer, progress=False).steps == 4


def test_truth_values_of_several_models_are_refused_as_an_answer():
    batch = ModelBatch([nn.Linear(3, 2) for _ in range(2)])
    pairs = [(torch.randn(B, 3), torch.randn(B, 2))] * 4
    with pytest.raises(TypeError, match=r"got \[2\] truth values"):
        fit(batch, optimizer_of(batch), pairs, mse_loss, callback=lambda step: step.losses > 1, progress=False)


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (1.0, TypeError), ("1", TypeError), (None, TypeError)])
def test_what_is_no_first_epoch_is_refused(epoch, error):
    batch = ModelBatch([nn.Linear(3, 2) for _ in range(2)])
    with pytest.raises(error, match="first_epoch"):
        fit(batch, optimizer_of(batch), [(torch.randn(B, 3), torch.randn(B, 2))], mse_loss, first_epoch=epoch)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(x)))


@pytest.mark.parametrize("chunk_size", ["auto", 1, 2, None])
@pytest.mark.parametrize(
    ("loss_fn", "rest", "text"),
    [
        (lambda out, y: torch.tensor(1.0), {}, "depend on the models' parameters"),
        (lambda out, y: mse_loss(out.detach(), y), {}, "depend on the models' parameters"),
        (mse_loss, {"shared_targets": False}, "Expected targets"),
        (mse_loss, {"max_norm": -1.0}, "positive norms"),
        (weighted, {"loss_settings": {"weight": torch.ones(3)}}, "could be one value for all models or one per model"),
    ],
)
def test_what_is_refused_in_the_first_step_has_changed_nothing(loss_fn, rest, text, chunk_size):
    batch = ModelBatch([Normed() for _ in range(3)], seeds=range(3))
    drawn = batch.streams.on("cpu")[0].get_state()
    before, pair = snapshot(batch)["tensors"], (torch.randn(B, 3), torch.randn(B, 3))
    with pytest.raises(ValueError, match=text):
        fit(batch, optimizer_of(batch), [pair], loss_fn, chunk_size=chunk_size, progress=False, **rest)
    torch.testing.assert_close(snapshot(batch)["tensors"], before, rtol=0, atol=0)
    assert torch.equal(batch.streams.on("cpu")[0].get_state(), drawn)


class Epochs(torch.utils.data.Sampler):
    """Yields all indices, and notes the epochs that it is told."""

    def __init__(self, of: int, size: int = 0) -> None:
        self.of, self.size, self.told = of, size, []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __iter__(self) -> Any:
        return iter([[i] for i in range(self.of)] if self.size else range(self.of))

    def __len__(self) -> int:
        return self.of


@pytest.mark.parametrize("place", ["sampler", "batch_sampler"])
def test_set_epoch_reaches_a_loaders_samplers_once_an_epoch(place):
    sampler = Epochs(4, size=place == "batch_sampler")
    loader = DataLoader(TensorDataset(torch.randn(4, 3), torch.randn(4, 2)), **{place: sampler})
    batch = ModelBatch([nn.Linear(3, 2) for _ in range(2)])
    fit(batch, optimizer_of(batch), loader, mse_loss, epochs=2, first_epoch=3, progress=False)
    assert sampler.told == [3, 4]


def test_evaluate_measures_models_that_use_torch_func():
    models = [Jacobian() for _ in range(3)]
    x = torch.randn(B, 4)
    labels = models[0](x).argmax(1)
    assert evaluate(ModelBatch(models, model_by_model=[""]), [(x, labels)])[0] == 1


class NoisyGradient(torch.autograd.Function):
    """The identity, with noise in its gradient; vmap cannot run it, so that its layer runs model by model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + 0.1 * torch.randn(gradient.shape, dtype=gradient.dtype)


class NoisyUnderVmap(Identity):
    """The same for vmap, under which its backward draws."""

    generate_vmap_rule = True

    backward = NoisyGradient.backward


class Noisy(nn.Module):
    def __init__(self, noise: Any) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.noise.apply(self.first(x))))


@pytest.mark.filterwarnings("ignore:.*model by model")
@pytest.mark.parametrize("noise", [NoisyGradient, NoisyUnderVmap])
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("chunk_size", [1, "auto", 2])
def test_numbers_drawn_in_a_backward_pass_are_each_models_own_or_it_is_said(chunk_size, count, noise):
    """Alone the noise comes from the generator that the masks come from; several models at once have no such one."""
    models, data = [Noisy(noise).double() for _ in range(count)], batches(False)
    expected = trained_alone(models, data, seeds=SEEDS[:count])
    batch = ModelBatch(models, seeds=SEEDS[:count])
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, **MOMENTUM)

    def train() -> None:
        fit(batch, optimizer, data, mse_loss, chunk_size=chunk_size, progress=False)

    if chunk_size == 1 or count == 1:
        train()
        assert_same_parameters(batch.models, expected)
    elif noise is NoisyUnderVmap:
        with pytest.raises(BatchingError, match=r"backward pass .* chunk_size=1"):
            train()
    else:
        with pytest.warns(UserWarning, match=r"backward pass .* chunk_size=1"):
            train()
