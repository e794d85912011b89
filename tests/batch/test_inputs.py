"""What is given to a batch: taken as each model takes it alone, or refused by name before anything has changed."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from oracle import M
from torch import Tensor, nn
from torch.nn import functional as F

from mbkit import ModelBatch, OptimizerFactory, fit, fit_alone

SEEDS = [5, 2, 8, 3]


def linears() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(4, 2) for _ in range(M)]


# ------------------------------------------------------------------ refused
@pytest.mark.parametrize("way", ["positional", "keyword", "nested"])
def test_a_tensor_without_numbers_is_refused(way: str) -> None:
    class Any_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Any) -> Tensor:
            return self.layer(x["x"][0] if isinstance(x, dict) else x)

    batch, x = ModelBatch([Any_() for _ in range(M)]), torch.zeros(8, 4, device="meta")
    with pytest.raises(ValueError, match="Expected inputs with numbers, got a tensor on the meta device"):
        batch(x=x) if way == "keyword" else batch({"x": [x]} if way == "nested" else x)


def test_a_model_on_the_meta_device_takes_such_tensors() -> None:
    batch = ModelBatch([nn.Linear(4, 2, device="meta") for _ in range(M)], model_by_model=[""])
    assert batch(torch.zeros(8, 4, device="meta")).shape == (M, 8, 2)


@pytest.mark.parametrize("said", ["no", 0, 1, "False", torch.tensor(True)])
def test_what_is_neither_true_nor_false_is_refused(said: object) -> None:
    with pytest.raises(TypeError, match="Expected True or False as shared_input, got"):
        ModelBatch(linears(), said)
    with pytest.raises(TypeError, match="Expected True or False as shared_input, got"):
        ModelBatch(linears())(torch.zeros(3, 4), shared_input=said)


@pytest.mark.parametrize("wrong", [{"shared_input": "no"}, {"model_by_model": ["nowhere"]}, {"seeds": [1, 2]}])
def test_a_refused_batch_draws_no_seeds(wrong: dict) -> None:
    models = linears()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)):
        ModelBatch(models, **wrong)
    assert torch.equal(torch.get_rng_state(), before)


class Holder:
    """An object that holds a tensor, as a graph does."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class OfHolder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, given: Holder) -> Tensor:
        return self.layer(given.x)


def test_an_object_that_hides_tensors_is_one_input_for_all_models_or_refused() -> None:
    models, x = [OfHolder() for _ in range(M)], torch.randn(M, 8, 4)
    out = ModelBatch(models)(Holder(x[0]))
    for m, model in enumerate(models):
        torch.testing.assert_close(out[m], model(Holder(x[0])))
    with pytest.raises(TypeError, match="got a Holder, whose tensors would be the same for all models"):
        ModelBatch(models, shared_input=False)(Holder(x))


# ------------------------------------------------------------------ mappings
class Encoding(UserDict):
    """What a tokenizer returns: a mapping that is not a dict, with attributes."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class OfEncoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, given: Encoding, scale: float = 1.0) -> Tensor:
        return self.layer(given.x) * scale


class OfNames(OfEncoding):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("road", [{"chunk_size": None}, {"chunk_size": 2}, {}], ids=str)
@pytest.mark.parametrize("kind", [OfEncoding, OfNames])
def test_each_model_gets_its_own_of_a_mapping(kind: type[nn.Module], road: dict) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(M, 8, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(M, 8, 2, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    models = [kind() for _ in range(M)]
    alone, others = copy.deepcopy(models), copy.deepcopy(models)
    for m, model in enumerate(alone):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(Encoding({"x": x[m]}) if kind is OfEncoding else x[m]), y[m]).backward()
            optimizer.step()
    given = Encoding({"x": x})
    data = [((given,) if kind is OfEncoding else given, y)] * 3
    batch = ModelBatch(models, shared_input=False)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.5)
    fit(batch, optimizer, data, F.mse_loss, progress=False, **road)
    fit_alone(others, torch.optim.SGD, {"lr": 0.5}, data, F.mse_loss, shared_input=False, progress=False)
    for m, model in enumerate(alone):
        torch.testing.assert_close(batch[m].layer.weight, model.layer.weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(others[m].layer.weight, model.layer.weight, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ buffers of another size, errors half-way
class First(nn.Module):
    """Takes its buffer's size from the first input, as an observer of quantization does."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(4, 1, dtype=torch.float64), way
        self.register_buffer("mean", torch.empty(0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.layer(x).detach().mean() * x.detach().mean(0)
        if self.mean.numel() == 0 and self.way == "data":
            self.mean.data = mean
        elif self.mean.numel() == 0:
            self.mean.resize_(mean.shape)
            self.mean.copy_(mean)
        return self.layer(x - self.mean)


@pytest.mark.filterwarnings("ignore:.* runs model by model")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("way", ["data", "resize_"])
def test_a_buffer_that_gets_its_size_in_the_first_call(way: str, nested: bool) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(First(way), nn.Tanh()) if nested else First(way) for _ in range(M)]
    alone, batch = copy.deepcopy(models), ModelBatch(models)
    for x in torch.randn(2, 8, 4, dtype=torch.float64):
        out = batch(x)
        for m, model in enumerate(alone):
            torch.testing.assert_close(out[m], model(x), rtol=1e-12, atol=1e-13)
    for m, model in enumerate(alone):
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(batch.stacked_buffers[name][m], buffer, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_last_batch_of_one_row_counts_as_it_does_alone(momentum: float | None) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=momentum)).double() for _ in range(M)]
    alone, batch = copy.deepcopy(models), ModelBatch(models)
    for rows in (6, 6, 1, 6):
        x = torch.randn(rows, 4, dtype=torch.float64)
        for model in (*alone, batch):
            try:
                model(x)
            except ValueError as error:
                assert "Expected more than 1 value per channel" in str(error)  # noqa: PT017
    for m, model in enumerate(alone):
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(batch.stacked_buffers[name][m], buffer, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", [[1], [0, 3]])
def test_such_an_error_changes_nothing_of_a_frozen_model(frozen: list[int]) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 8), nn.BatchNorm1d(8)).double() for _ in range(M)]
    alone, batch = copy.deepcopy(models), ModelBatch(models, seeds=SEEDS)
    batch.freeze(frozen)
    for _ in range(2):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            batch(torch.randn(1, 4, dtype=torch.float64))
    for m, model in enumerate(alone):
        assert batch[m][2].num_batches_tracked == (0 if m in frozen else 2)
        torch.manual_seed(SEEDS[m])
        for _ in range(0 if m in frozen else 2):
            model[0](torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator()))
        assert torch.equal(batch.streams.on("cpu")[m].get_state(), torch.get_rng_state())
