"""`autocast=torch.bfloat16`: forward and loss of each model under torch.autocast, backward and update outside it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracle import MOMENTUM, Identity, assert_same_parameters, train_alone, trained_alone
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mbkit import ModelBatch, OptimizerFactory, compare, fit, fit_alone, sweep, train_steps

BF16 = torch.bfloat16
SEEDS = [3, 1, 2, 5]
ROADS: dict[str, tuple[int, dict[str, Any]]] = {  # how many models, and fit's arguments
    "by itself": (1, {}),
    "at once": (4, {"chunk_size": None}),
    "in chunks": (4, {"chunk_size": 2}),
    "one by one": (4, {"chunk_size": 1}),
    "compiled": (4, {"compile": True}),
}


@pytest.fixture(autouse=True)
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)


def networks(count: int) -> list[nn.Module]:
    def one() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    return [one() for _ in range(count)]


def data(steps: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(steps)]


def batch_of(models: list[nn.Module], optimizer_cls: type = torch.optim.SGD) -> tuple[Any, Any]:
    batch = ModelBatch(models, seeds=SEEDS[: len(models)])
    return batch, OptimizerFactory(optimizer_cls).create_optimizer(batch, **MOMENTUM)


def way(models: Any, others: Any) -> float:
    """Return how far all parameters are from those of other models."""
    pairs = zip(models, others, strict=True)
    each = [p - q for a, b in pairs for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    return torch.stack([gap.detach().norm() for gap in each]).norm().item()


@pytest.mark.parametrize("road", ROADS)
def test_on_every_road_each_model_is_the_one_that_trains_alone_under_autocast(monkeypatch, road):
    """Sums in another order are seldom rounded to another bfloat16: far less than bfloat16 itself makes of float32.

    A compiled linear layer adds its bias after its product is rounded, so that each layer is rounded once more.
    """
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_, **__: graph)  # the traced graph itself, uncompiled
    count, how = ROADS[road]
    models, pairs = networks(count), data()
    low, full = (trained_alone(models, pairs, loss_fn=cross_entropy, seeds=SEEDS, autocast=a) for a in (BF16, None))
    batch, optimizer = batch_of(models)
    history = fit(batch, optimizer, pairs, cross_entropy, autocast=BF16, progress=False, **how)
    assert road in ("by itself", "in chunks") or history.how == {"at once": "all models at once"}.get(road, road)
    noise = way(low, full)
    assert way(batch.models, low) < (2 if road == "compiled" else 0.2) * noise
    assert way(batch.models, full) > 0.2 * noise
    assert not torch.is_autocast_enabled("cpu")


class Looks(Identity):
    """The identity, which notes whether autocast is on."""

    generate_vmap_rule = True
    seen: list[tuple[str, bool]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Looks.seen.append(("backward", torch.is_autocast_enabled("cpu")))
        return gradient


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        Looks.seen.append(("forward", torch.is_autocast_enabled("cpu")))
        return self.layer(Looks.apply(x * self.layer.weight.sum()))


class LookingSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        Looks.seen.append(("update", torch.is_autocast_enabled("cpu")))
        return super().step(closure)


def looking_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    Looks.seen.append(("loss", torch.is_autocast_enabled("cpu")))
    return cross_entropy(outputs, targets)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2, 1, "alone"])
def test_backward_and_update_are_outside_of_it_also_where_it_is_around_all(chunk_size, around):
    models, Looks.seen = [Looking() for _ in range(4)], []
    autocast = None if around else BF16
    with torch.autocast("cpu", BF16) if around else nullcontext():
        if chunk_size == "alone":
            fit_alone(models, LookingSGD, MOMENTUM, data(2), looking_loss, autocast=autocast, progress=False)
        else:
            batch, optimizer = batch_of(models, LookingSGD)
            more = {"chunk_size": chunk_size, "autocast": autocast, "progress": False}
            fit(batch, optimizer, data(2), looking_loss, **more)
    assert set(Looks.seen) == {("forward", True), ("loss", True), ("backward", False), ("update", False)}


def test_fit_alone_is_the_loop_that_everybody_writes():
    models, pairs = networks(4), data()
    expected = trained_alone(models, pairs, loss_fn=cross_entropy, seeds=SEEDS, autocast=BF16)
    fit_alone(models, torch.optim.SGD, MOMENTUM, pairs, cross_entropy, seeds=SEEDS, autocast=BF16, progress=False)
    assert_same_parameters(models, expected, tolerance=0)


def test_a_run_goes_on_in_its_own_precision_only(tmp_path):
    models, pairs = networks(4), data(3)

    def train(epochs: int, autocast: Any, **more: Any) -> list[nn.Module]:
        batch, optimizer = batch_of(copy.deepcopy(models))
        fit(batch, optimizer, pairs, cross_entropy, epochs, autocast=autocast, progress=False, **more)
        return batch.models

    train(1, BF16, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"Expected autocast=torch\.bfloat16, as in the run saved"):
        train(2, None, checkpoint=tmp_path)
    assert_same_parameters(train(2, BF16, checkpoint=tmp_path), train(2, BF16), tolerance=0)


def small(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def test_a_sweep_trains_its_trials_so():
    pairs, configs = data(4), [{"width": 8, **MOMENTUM}, {"width": 4, **MOMENTUM}]
    result = sweep(small, torch.optim.SGD, configs, pairs, cross_entropy, rungs=2, autocast=BF16, progress=False)
    for trial, config in enumerate(configs):
        torch.manual_seed(trial)
        start = small(config["width"])
        low, full = copy.deepcopy(start), copy.deepcopy(start)
        train_alone([low], pairs * 2, loss_fn=cross_entropy, seeds=None, autocast=BF16)
        train_alone([full], pairs * 2, loss_fn=cross_entropy, seeds=None)
        assert way([result.load(trial)], [low]) < 0.2 * way([low], [full])


@pytest.mark.parametrize(
    ("dtype", "error", "text"),
    [
        (torch.float16, ValueError, "float16 needs a scaler .* mbkit.GradScaler"),
        (torch.float64, ValueError, "got torch.float64"),
        (True, TypeError, "Expected autocast as a dtype or None, got True"),
        ("bfloat16", TypeError, "pass torch.bfloat16"),
    ],
)
@pytest.mark.parametrize("how", ["fit", "train_steps", "fit_alone", "compare", "sweep"])
def test_what_fit_cannot_train_in_is_refused_before_anything_is_trained(how, dtype, error, text):
    models, pairs = networks(2), data(1)
    before = copy.deepcopy(models)
    call, given = {
        "fit": (fit, (*batch_of(models), pairs, cross_entropy)),
        "train_steps": (train_steps, (*batch_of(models), pairs, cross_entropy)),
        "fit_alone": (fit_alone, (models, torch.optim.SGD, MOMENTUM, pairs, cross_entropy)),
        "compare": (compare, (models, torch.optim.SGD, MOMENTUM, pairs, cross_entropy)),
        "sweep": (sweep, (small, torch.optim.SGD, [{"width": 4}], pairs, cross_entropy)),
    }[how]
    with pytest.raises(error, match=text) as refused:
        call(*given, autocast=dtype)
    assert "batch 0" not in str(refused.value)
    assert_same_parameters(models, before, tolerance=0)
