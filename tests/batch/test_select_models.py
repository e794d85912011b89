"""Models taken out of a batch, and batches put together, train on exactly as they do alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracle import close
from torch import Tensor, nn

from mbkit import BatchingError, ModelBatch
from mbkit.vmap import models_with_gradient

M, STEPS, CUT = 5, 6, 3
SEEDS = [11, 7, 2**40, 0, 5]
DOUBLE = {"dtype": torch.float64}


class Keeps(nn.Module):
    """All that a model may keep: tied weights, running buffers, tensors in attributes and lists."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, **DOUBLE), nn.Linear(3, 3, **DOUBLE)
        self.second.weight = self.first.weight
        self.norm, self.drop, self.out = nn.BatchNorm1d(3, **DOUBLE), nn.Dropout(rate), nn.Linear(3, 2, **DOUBLE)
        self.register_buffer("mean", torch.zeros(2, **DOUBLE))
        self.latest, self.history, self.table = torch.zeros(2, **DOUBLE), [], torch.ones(2, **DOUBLE)
        self.first.weight.register_hook(lambda gradient: gradient * (1 + rate))

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.drop(self.norm(self.second(self.first(x).tanh())))) * self.table
        y = y + self.mean + sum(self.history)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        self.latest = y.detach().mean(0)
        self.history = [self.latest, 0.1 * self.latest]
        return y


class Counts(Keeps):
    """A number of each model's own, and Python's random numbers, so the whole model runs model by model."""

    positive = 0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) + random.random()
        self.positive += int((y > 0).sum())
        return y * (1 + self.positive % 3)


def build(kind: type) -> list[nn.Module]:
    """Return the same models at each call; copies would have lost the hooks of their parameters."""
    torch.manual_seed(3)
    return [kind(0.1 * (1 + m)) for m in range(M)]


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(M, 4, 3, **DOUBLE), torch.randn(M, 4, 2, **DOUBLE)) for _ in range(STEPS)]


def batch_of(kind: type, rows: Sequence[int] = range(M)) -> ModelBatch:
    models, paths = build(kind), [""] if kind is Counts else []
    return ModelBatch([models[m] for m in rows], False, seeds=[SEEDS[m] for m in rows], model_by_model=paths)


def backward(batch: ModelBatch, pair: tuple[Tensor, Tensor], rows: Any = slice(None)) -> None:
    x, y = (t[rows] for t in pair)
    batch.compute_loss(batch(x), y, nn.functional.mse_loss, shared_targets=False).backward()


def update(model: nn.Module) -> None:
    for p in model.parameters():
        p.data -= 0.1 * p.grad
        p.grad = None


def check(batch: ModelBatch, rows: Sequence[int], kind: type, steps: int = STEPS) -> None:
    """Compare a batch with the models `rows`, each trained alone from the start."""
    rows = [m % M for m in rows]
    assert batch.seeds == [SEEDS[m] for m in rows]
    lone, pairs = build(kind), data()
    for row, m in enumerate(rows):
        torch.manual_seed(SEEDS[m])
        random.seed(SEEDS[m])
        for x, y in pairs[:steps]:
            nn.functional.mse_loss(lone[m](x[m]), y[m]).backward()
            update(lone[m])
        assert torch.equal(batch.streams.on("cpu")[row].get_state(), torch.get_rng_state())
        got, expected = batch[row], lone[m]
        for name, tensor in expected.state_dict().items():
            close(got.state_dict()[name], tensor, 1e-12, f"{name} of model {m}")
        for mine, kept in zip([got.latest, *got.history], [expected.latest, *expected.history], strict=True):
            close(mine, kept, 1e-12, f"what model {m} keeps")
        assert getattr(got, "positive", 0) == getattr(expected, "positive", 0)


@pytest.mark.filterwarnings("ignore:The models draw from Python's random")
@pytest.mark.parametrize("kind", [Keeps, Counts])
@pytest.mark.parametrize("rows", [[3, 0, -1], [2]], ids=str)
def test_the_selected_and_the_others_train_on_as_alone(kind: type, rows: list[int]) -> None:
    """They are taken out between a backward pass and its update."""
    wide, pairs = batch_of(kind), data()
    for pair in pairs[:CUT]:
        backward(wide, pair)
        update(wide)
    backward(wide, pairs[CUT])
    few = wide.select(rows)
    assert torch.equal(few.latest_losses, wide.latest_losses[rows])
    for batch, numbers in ((few, rows), (wide, slice(None))):
        update(batch)
        for pair in pairs[CUT + 1 :]:
            backward(batch, pair, numbers)
            update(batch)
    check(few, rows, kind)
    check(wide, range(M), kind)


@pytest.mark.filterwarnings("ignore:The models draw from Python's random")
@pytest.mark.parametrize("kind", [Keeps, Counts])
def test_merged_batches_train_on_as_alone(kind: type) -> None:
    """Two batches, of one of which two models have been selected."""
    pairs, parts = data(), {(4, 1): [0, 1], (0, 3, 2): [1, 0]}
    batches = [batch_of(kind, rows) for rows in parts]
    for batch, rows in zip(batches, parts, strict=True):
        for pair in pairs[:CUT]:
            backward(batch, pair, list(rows))
            update(batch)
    before = torch.get_rng_state()
    merged = ModelBatch.merge(batch.select(own) for batch, own in zip(batches, parts.values(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    for pair in pairs[CUT:]:
        backward(merged, pair, [4, 1, 3, 0])
        update(merged)
    check(merged, [4, 1, 3, 0], kind)
    for batch, rows in zip(batches, parts, strict=True):
        check(batch, rows, kind, CUT)


def test_a_batch_that_has_not_been_called_is_merged_with_one_that_has() -> None:
    """Streams and gradients that are there in one of them, a frozen model, and eval mode."""

    def pair(seed: int) -> ModelBatch:
        return ModelBatch([nn.Sequential(nn.Linear(3, 2), nn.Dropout()) for _ in range(2)], seeds=[seed, 9])

    called, fresh = pair(3), pair(4)
    called(torch.ones(4, 3)).sum().backward()
    called.freeze(1)
    gradient = called.stacked_params["0.weight"].grad
    merged = ModelBatch.merge([called, fresh])
    assert not fresh.streams.in_use
    assert (merged.frozen, merged.seeds) == ([1], [3, 9, 4, 9])
    assert torch.equal(merged.stacked_params["0.weight"].grad, torch.cat([gradient, torch.zeros(2, 2, 3)]))
    assert models_with_gradient(merged.stacked_params["0.weight"].grad, 4).tolist() == [True, True, False, False]
    expected = [g.get_state() for g in called.streams.on("cpu")]
    expected += [torch.Generator().manual_seed(seed).get_state() for seed in (4, 9)]
    assert all(torch.equal(g.get_state(), e) for g, e in zip(merged.streams.on("cpu"), expected, strict=True))
    few = merged.eval().select([2, 1])
    assert few.frozen == [1]
    assert not any(module.training for module in (few, *few.modules(), *few[0].modules()))
    assert models_with_gradient(few.stacked_params["0.bias"].grad, 2).tolist() == [False, True]


def test_objects_that_watch_the_models_go_on_watching() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.seen.append(output.detach())

    models, recorders = [nn.Linear(3, 2) for _ in range(3)], [Recorder() for _ in range(3)]
    for model, recorder in zip(models, recorders, strict=True):
        model.register_forward_hook(recorder)
    few = ModelBatch(models, model_by_model=[""]).select([2, 0])
    few(torch.ones(4, 3))
    assert [len(recorder.seen) for recorder in recorders] == [1, 0, 1]
    close(recorders[2].seen[0], few[0](torch.ones(4, 3)), 1e-6)


@pytest.mark.parametrize(
    ("models", "error", "text"),
    [
        ([], ValueError, "at least one model, and none twice"),
        ([1, 0, -2], ValueError, r"none twice, got \[1, 0, 1\]"),
        ([0, 3], IndexError, "from 0 to 2, got 3"),
        (-4, IndexError, "from 0 to 2, got -4"),
        ([0, 1.0], TypeError, "got 1.0"),
        ("01", TypeError, "got '01'"),
        (True, TypeError, "got True"),
        (1.0, TypeError, "got 1.0"),
    ],
)
def test_models_that_cannot_be_selected(models: Any, error: type[Exception], text: str) -> None:
    batch = ModelBatch([nn.Linear(2, 1) for _ in range(3)])
    for verb in (batch.select, batch.freeze, batch.unfreeze) if error is not ValueError else (batch.select,):
        with pytest.raises(error, match=text):
            verb(models)
    assert batch.frozen == []


def test_a_loss_that_keeps_something_for_each_model_cannot_serve_two_batches() -> None:
    kept = []

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        kept[:] = [out.detach()]
        return (out - y).square().mean()

    batch = ModelBatch([nn.Linear(3, 2) for _ in range(3)])
    batch.compute_loss(batch(torch.ones(4, 3)), torch.ones(4, 2), loss_fn)
    with pytest.raises(ValueError, match="keep nothing outside of the models"):
        batch.select(0)


def test_batches_that_do_not_belong_together() -> None:
    first, kept = ModelBatch([nn.Linear(3, 2)]), batch_of(Keeps)
    kept(torch.zeros(M, 4, 3, **DOUBLE))
    with pytest.raises(BatchingError, match=r"history is .* but has to be alike"):
        ModelBatch.merge([kept, batch_of(Keeps)])
    cases = [
        ([], "all with the same shared_input, got none"),
        ([first, ModelBatch([nn.Linear(3, 2)], shared_input=False)], "all with the same shared_input"),
        ([first, ModelBatch([nn.Linear(4, 2)])], r"Model 1 has 'weight' in another shape: got \[2, 4\]"),
    ]
    for batches, text in cases:
        with pytest.raises(ValueError, match=text):
            ModelBatch.merge(batches)
