"""On a CUDA device each model is the one alone, too: layers, masks, roads, autocast, scaler, streams."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from oracle import SEEDS, M, close
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mbkit
from mbkit import GradScaler, ModelBatch, OptimizerFactory, fit
from mbkit.models import GPT, MLP, LeNet5, LSTMClassifier, ResNet
from mbkit.training.options import StepOptions
from mbkit.training.step import Stepper

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

CUDA = torch.device("cuda", 0)
B, STEPS = 8, 4
RATES = [0.01, 0.02, 0.005, 0.03]


def images(g: torch.Generator) -> Tensor:
    return torch.randn(B, 3, 32, 32, generator=g, dtype=torch.float64)


def rows(g: torch.Generator) -> Tensor:
    return torch.randn(B, 20, generator=g, dtype=torch.float64)


class Dropping(nn.Module):
    """Convolution, normalisation, and three kinds of dropout, whose masks come from the device's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.channels, self.numbers, self.alpha = nn.Dropout2d(0.3), nn.Dropout(0.4), nn.AlphaDropout(0.2)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.numbers(self.channels(self.norm(self.conv(x))).relu())
        return self.out(self.alpha(h.mean((2, 3))))


NETS = {
    "MLP": (lambda: MLP((20, 16, 16, 4)), rows),
    "LeNet5": (LeNet5, images),
    "ResNet": (ResNet, images),
    "dropout": (Dropping, images),
    "masks": (lambda: MLP((20, 16, 16, 4), dropout=0.4), rows),
    "GPT": (GPT, lambda g: torch.randint(64, (B, 32), generator=g)),
    "LSTM": (LSTMClassifier, lambda g: torch.randn(B, 32, 16, generator=g, dtype=torch.float64)),
}


def models_of(name: str, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    return [NETS[name][0]().to(CUDA, dtype) for _ in range(M)]


def data_of(name: str, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    pairs = [(NETS[name][1](g), torch.randint(4, (B,), generator=g)) for _ in range(STEPS)]
    return [((x.to(dtype) if x.is_floating_point() else x).to(CUDA), y.to(CUDA)) for x, y in pairs]


def alone(models: list[nn.Module], data: Any, optimizer_cls: type, autocast: bool = False) -> list[nn.Module]:
    """Return copies of the models, trained by themselves by the plainest loop."""
    models = copy.deepcopy(models)
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        optimizer = optimizer_cls(model.parameters(), lr=RATES[m])
        for x, y in data:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    return models


def assert_same(batch: ModelBatch, models: list[nn.Module], tolerance: float) -> None:
    for m, model in enumerate(models):
        own = batch[m].state_dict()
        for name, expected in model.state_dict().items():
            close(own[name].double(), expected.double(), tolerance, f"{name} of model {m}")


def batch_of(models: list[nn.Module], optimizer_cls: type) -> tuple[ModelBatch, Any]:
    batch = ModelBatch(models, seeds=SEEDS)
    return batch, OptimizerFactory(optimizer_cls).create_optimizer(batch, lr=RATES)


@pytest.mark.parametrize("how", [{"chunk_size": None}, {"chunk_size": 3}, {"chunk_size": 1}, {}], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_each_network_on_each_road(name, how):
    models, data = models_of(name), data_of(name)
    expected = alone(models, data, torch.optim.Adam)
    batch, optimizer = batch_of(models, torch.optim.Adam)
    fit(batch, optimizer, data, cross_entropy, progress=False, **how)
    assert_same(batch, expected, 1e-8)  # Adam divides by small numbers; float64 rounds at 1e-16


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_each_optimizer(optimizer_cls):
    models, data = models_of("LeNet5"), data_of("LeNet5")
    expected = alone(models, data, optimizer_cls)
    batch, optimizer = batch_of(models, optimizer_cls)
    fit(batch, optimizer, data, cross_entropy, progress=False)
    assert_same(batch, expected, 1e-8)


@pytest.mark.parametrize("name", ["MLP", "masks", "LeNet5", "ResNet", "GPT"])
def test_a_compiled_step_is_compiled_and_the_same(name):
    models, data = models_of(name), data_of(name)
    expected = alone(models, data, torch.optim.Adam)
    batch, optimizer = batch_of(models, torch.optim.Adam)
    history = fit(batch, optimizer, data, cross_entropy, compile=True, progress=False)
    assert history.how == "compiled"
    assert_same(batch, expected, 1e-8)


def test_a_replayed_step_sees_new_rates_and_tensors_that_have_moved(monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    models, data = models_of("masks"), [*data_of("masks"), *data_of("masks")]
    expected, seen = copy.deepcopy(models), []
    for m, model in enumerate(expected):
        torch.manual_seed(SEEDS[m])
        optimizer = torch.optim.SGD(model.parameters(), lr=RATES[m], momentum=0.9)
        seen.append([])
        for step, (x, y) in enumerate(data):
            optimizer.param_groups[0]["lr"] = RATES[m] / (step + 1)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            seen[m].append(loss.detach())
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATES, momentum=0.9)
    stepper, losses = Stepper(batch, optimizer, StepOptions(cross_entropy, compile=True)), []
    for step, (x, y) in enumerate(data):
        for group, rate in zip(optimizer.param_groups, RATES, strict=True):
            group["lr"] = rate / (step + 1)
        if step == 4:
            for p in batch.parameters():
                p.data = p.data.clone()
        losses.append(stepper.step(x, y)[0])
        assert stepper.how == "compiled"
    assert len(replays) == len(data) - 2  # not in the first step, nor where the parameters have moved
    assert_same(batch, expected, 1e-8)
    close(torch.stack(losses, 1).double(), torch.stack([torch.stack(row) for row in seen]), 1e-8, "losses kept")


@pytest.mark.parametrize("size", [(5, 7), (8, 64), (3, 4, 6, 6)], ids=str)
@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout(0.1), nn.Dropout2d(0.3), nn.AlphaDropout(0.2)], ids=str)
def test_masks_are_those_of_each_model_alone_bit_for_bit(drop, size):
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.drop = nn.Parameter(torch.ones(())), copy.deepcopy(drop)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.drop(x * self.weight)
            return h, self.drop(h[..., 1:]), self.drop(h.transpose(0, 1))  # which lie in other orders

    models = [Mask().to(CUDA) for _ in range(M)]
    batch, x = ModelBatch(models, seeds=SEEDS), torch.ones(size, device=CUDA)
    drawn = [batch(x), batch(x)]
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        for call in drawn:
            for mine, expected in zip(call, model(x), strict=True):
                assert torch.equal(mine[m], expected)


def test_autocast_rounds_each_model_as_alone():
    models, data = models_of("LeNet5", torch.float32), data_of("LeNet5", torch.float32)
    expected = alone(models, data, torch.optim.SGD, autocast=True)
    batch, optimizer = batch_of(models, torch.optim.SGD)
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = batch.compute_loss(batch(x), y, cross_entropy)
        loss.backward()
        optimizer.step()
    assert_same(batch, expected, 2**-8)  # the rounding of bfloat16, of numbers up to 1


def test_a_scaler_of_m_scales_follows_each_model():
    models, data = models_of("MLP", torch.float32), data_of("MLP", torch.float32)
    expected = copy.deepcopy(models)
    scales = []
    for m, model in enumerate(expected):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=RATES[m]), torch.amp.GradScaler("cuda", 1024.0)
        for x, y in data:
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    batch, optimizer = batch_of(models, torch.optim.SGD)
    scaler = GradScaler(init_scale=1024.0)
    for x, y in data:
        optimizer.zero_grad()
        losses = batch.compute_loss(batch(x), y, cross_entropy, reduction="none")
        scaler.scale(losses).sum().backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(batch, expected, 1e-5)  # float32, four steps
    assert torch.as_tensor(scaler.get_scale()).tolist() == scales


def test_a_saved_run_goes_on_with_the_devices_streams(tmp_path):
    models, data = models_of("dropout"), data_of("dropout")
    whole, optimizer = batch_of(models, torch.optim.SGD)
    fit(whole, optimizer, data, cross_entropy, epochs=2, progress=False)
    half, optimizer = batch_of(models, torch.optim.SGD)
    fit(half, optimizer, data, cross_entropy, progress=False)
    mbkit.save_run(tmp_path / "run", half, optimizer)
    other, optimizer = batch_of(models, torch.optim.SGD)
    mbkit.load_run(tmp_path / "run", other, optimizer)
    fit(other, optimizer, data, cross_entropy, progress=False)
    assert_same(other, [whole[m] for m in range(M)], 1e-10)  # the device adds up in an order of its own


def test_a_model_moved_to_the_device_and_back_is_itself():
    models = models_of("dropout")
    batch = ModelBatch(models, seeds=SEEDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch.cpu().to(CUDA)
    assert_same(batch, models, 1e-15)


def test_selected_models_go_on_with_their_masks():
    models, data = models_of("dropout"), data_of("dropout")
    expected = alone(models, [*data, *data], torch.optim.SGD)
    batch, optimizer = batch_of(models, torch.optim.SGD)
    fit(batch, optimizer, data, cross_entropy, progress=False)
    few = batch.select([2, 0])
    fit(few, optimizer.select([2, 0], few), data, cross_entropy, progress=False)
    assert_same(few, [expected[2], expected[0]], 1e-8)


def test_a_sweep_trains_each_trial_as_alone(tmp_path):
    def build() -> nn.Module:
        return NETS["MLP"][0]().to(CUDA, torch.float64)

    models, data = [], data_of("MLP")
    for seed in SEEDS:
        torch.manual_seed(seed)
        models.append(build())
    expected = alone(models, [*data, *data], torch.optim.Adam)
    how = {"folder": tmp_path, "seeds": SEEDS, "rungs": (1, 2), "reduction_factor": None, "models_per_batch": 3}
    configs = [{"lr": rate} for rate in RATES]
    result = mbkit.sweep(build, torch.optim.Adam, configs, data, cross_entropy, progress=False, **how)
    for m, model in enumerate(expected):
        trained = result.load(m).to(CUDA)
        for p, q in zip(trained.parameters(), model.parameters(), strict=True):
            close(p, q, 1e-8, f"trial {m}")
