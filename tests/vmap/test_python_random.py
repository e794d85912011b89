"""Models and losses that draw from Python's and numpy's generators: each model its own numbers, whatever the road."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from oracle import assert_same_parameters, close, trained_alone
from torch import nn

from mbkit import ModelBatch, OptimizerFactory, fit

SEEDS = [3, 2**33 + 1, 8, 5]
STEPS, RATE = 4, 0.05
DRAWS = pytest.mark.filterwarnings("ignore:The models draw from")


class LayersDropped(nn.Module):
    """Stochastic depth by Python's generator, and noise by numpy's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.first, self.dropout = nn.Linear(4, 4), nn.Dropout(0.3)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            if random.random() < 0.5:
                x = x + layer(x)
        return self.dropout(x) + float(np.random.randn()) + 0.1 * random.gauss(0, 1)


class Late(nn.Linear):
    """Draws from its third call on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (random.random() if self.calls > 2 else 1)


def mixing_loss(out, y):
    return nn.functional.mse_loss(out, y) * random.random() * np.random.rand()


NETS = {
    "forward": (LayersDropped, nn.functional.mse_loss),
    "layer": (lambda: nn.Sequential(nn.Linear(4, 4), LayersDropped(), nn.Linear(4, 4)), nn.functional.mse_loss),
    "loss": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout()), mixing_loss),
    "both": (LayersDropped, mixing_loss),
}
ROADS = {
    "at once": (4, {"chunk_size": None}),
    "three models": (3, {}),
    "four models": (4, {}),
    "chunks": (4, {"chunk_size": 2}),
    "one by one": (4, {"chunk_size": 1}),
    "compiled": (4, {"compile": True}),
}


def data():
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in "xy") for _ in range(STEPS)]


def build(make, count):
    torch.manual_seed(0)
    return [make().double() for _ in range(count)]


def alone(models, loss_fn=nn.functional.mse_loss):
    return trained_alone(models, data(), False, loss_fn, None, SEEDS, configs={"lr": RATE})


def sgd(batch):
    return OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATE)


@pytest.mark.filterwarnings("ignore:.*model by model", "ignore:.*compile")
@DRAWS
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("net", NETS)
def test_each_model_draws_its_own_as_alone(net, road):
    (make, loss_fn), (count, options) = NETS[net], ROADS[road]
    models = build(make, count)
    batch = ModelBatch(copy.deepcopy(models), seeds=SEEDS[:count])
    before = random.getstate(), np.random.get_state()[1].tolist()
    fit(batch, sgd(batch), data(), loss_fn, progress=False, **options)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before or net == "loss"
    assert_same_parameters(list(batch), alone(models, loss_fn), 1e-12)


@DRAWS
@pytest.mark.parametrize("paths", [[""], ["1"]])
def test_named_beforehand(paths):
    models = build(NETS["layer"][0], 3)
    batch = ModelBatch(copy.deepcopy(models), seeds=SEEDS[:3], model_by_model=paths)
    optimizer = sgd(batch)
    for x, y in data():
        optimizer.zero_grad()
        batch.compute_loss(batch(x), y, nn.functional.mse_loss).backward()
        optimizer.step()
    assert_same_parameters(list(batch), alone(models), 1e-12)


def test_it_is_said_once_and_by_name():
    batch, x = ModelBatch(build(LayersDropped, 2)), data()[0][0]
    with pytest.warns(UserWarning, match=r"from Python's random and numpy\.random, .* random\.seed\(") as said:
        batch(x)
    assert len(said) == 1
    batch(x)


def test_models_that_begin_late_to_draw():
    models = build(lambda: Late(4, 4), 3)
    batch, x = ModelBatch(copy.deepcopy(models), seeds=SEEDS[:3]), data()[0][0]
    for _ in range(2):
        batch(x)
    with pytest.warns(UserWarning, match="draw from Python's random,"):
        outputs = batch(x)
    for m, model in enumerate(models):
        model(x)
        model(x)
        random.seed(SEEDS[m])
        close(outputs[m], model(x), 1e-12)


@DRAWS
def test_a_state_goes_on_with_the_same_numbers():
    models, x = build(LayersDropped, 3), data()[0][0]
    first, second = (ModelBatch(models, seeds=SEEDS[:3]) for _ in range(2))
    first(x)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert torch.equal(copy.deepcopy(first)(x), second(x))


def test_a_frozen_model_draws_nothing():
    models, x = build(LayersDropped, 2), data()[0][0]
    batch, other = (ModelBatch(models, seeds=SEEDS[:2]) for _ in range(2))
    with pytest.warns(UserWarning, match="draw from"):
        expected = other(x)
    batch.freeze(1)
    with pytest.warns(UserWarning, match="draw from"):
        batch(x)
    batch.unfreeze(1)
    assert torch.equal(batch(x)[1], expected[1])


@DRAWS
def test_a_normal_number_that_numpy_has_in_store_is_nobodys_in_the_first_call() -> None:
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0 + np.random.randn()

    batch = ModelBatch([Noisy(2, 1) for _ in SEEDS], seeds=SEEDS)
    np.random.seed(0)
    np.random.randn()  # draws two, and keeps one
    drawn = torch.stack([batch(torch.ones(1, 2)).flatten() for _ in range(3)])
    for m, seed in enumerate(SEEDS):
        np.random.seed(seed % 2**32)
        close(drawn[:, m], torch.tensor([np.random.randn() for _ in range(3)], dtype=drawn.dtype), 1e-6)
