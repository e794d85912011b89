"""Gradients: when they are cleared, when they add up, and how they are clipped, against torch.nn.utils."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import NETS, SEEDS, M, assert_same_models, batches, build, close
from torch import Tensor, nn
from torch.nn import functional as F

from mbkit import ModelBatch


def backward(batch: ModelBatch, data: tuple[Tensor, Tensor]) -> None:
    batch.compute_loss(batch(data[0]), data[1], F.mse_loss).backward()


# ------------------------------------------------------------------ zero_grad
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["mlp", "tied", "frozen", "one number"])
def test_nothing_stale_is_left_after_zero_grad(name: str, set_to_none: bool) -> None:
    """The published library's fault: the step after zero_grad() still held the gradient of the step before."""
    models, data = build(name), batches(own=False)
    batch = ModelBatch(models)
    for x, y in data:
        backward(batch, (x, y))
        before = {key: stack.grad for key, stack in batch.stacked_params.items()}
        batch.zero_grad(set_to_none=set_to_none)
        for key, stack in batch.stacked_params.items():
            if set_to_none or not stack.requires_grad:
                assert stack.grad is None, key
            else:
                assert stack.grad is before[key]
                assert not stack.grad.any(), key
        backward(batch, (x, y))
        for model in models:
            model.zero_grad()
            F.mse_loss(model(x), y).backward()
        assert_same_models(batch, models)
        backward(batch, (x, y))  # adds up
        for model in models:
            F.mse_loss(model(x), y).backward()
        assert_same_models(batch, models)
        batch.zero_grad(set_to_none=set_to_none)


def test_one_models_loss_gives_the_others_no_gradient() -> None:
    batch = ModelBatch(build("mlp"))
    x, y = batches(own=False)[0]
    batch.compute_loss(batch(x), y, F.mse_loss, reduction="none")[2].backward()
    for stack in batch.stacked_params.values():
        assert [bool(row.any()) for row in stack.grad] == [False, False, True, False]


# ------------------------------------------------------------------ clipping
LIMITS = [1e-3, [0.05, 1e9, 0.2, 1e-6], torch.tensor([1.0, 2.0, 0.1, 0.3]), (0.3, 0.1, 0.2, 0.1), math.inf]


CASES = [(name, norm_type) for name in NETS for norm_type in (2.0, 1.0, math.inf, 3.0)]
CASES.remove(("one number", math.inf))  # torch has no infinity norm of an empty tensor, and says so


@pytest.mark.parametrize(("name", "norm_type"), CASES)
def test_clipping_is_each_models_own(name: str, norm_type: float) -> None:
    limits = LIMITS if name == "mlp" else LIMITS[1:2]
    data = batches(own=False)[0]
    for limit in limits:
        models = build(name)
        batch = ModelBatch(models, seeds=SEEDS)
        backward(batch, data)
        norms = batch.clip_grad_norm_(limit, norm_type)
        assert norms.shape == (M,)
        each = [limit] * M if isinstance(limit, float) else [float(value) for value in limit]
        for m, model in enumerate(models):
            torch.manual_seed(SEEDS[m])
            F.mse_loss(model(data[0]), data[1]).backward()
            close(norms[m], nn.utils.clip_grad_norm_(model.parameters(), each[m], norm_type))
        assert_same_models(batch, models)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_leaves_the_other_models_bits_alone(bad: float) -> None:
    models, data = build("mlp"), batches(own=False)[0]
    batch, clean = ModelBatch(models), ModelBatch(models)
    backward(batch, data)
    backward(clean, data)
    batch.stacked_params["0.weight"].grad[1, 0, 0] = bad
    norms, expected = batch.clip_grad_norm_(0.1), clean.clip_grad_norm_(0.1)
    lone = models[1]
    F.mse_loss(lone(data[0]), data[1]).backward()
    lone[0].weight.grad[0, 0] = bad
    alone = nn.utils.clip_grad_norm_(lone.parameters(), 0.1)
    torch.testing.assert_close(norms[1], alone, equal_nan=True)
    others = [0, 2, 3]
    assert torch.equal(norms[others], expected[others])
    for key, stack in batch.stacked_params.items():
        assert torch.equal(stack.grad[others], clean.stacked_params[key].grad[others])
        torch.testing.assert_close(stack.grad[1], lone.get_parameter(key).grad, equal_nan=True)


def test_parameters_of_several_dtypes_are_clipped_together() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2).double())
            self.c = nn.Parameter(torch.randn(2, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a * x).sum() + self.b.sum() ** 2 + self.c.abs().square().sum()

    models = [Mixed() for _ in range(M)]
    batch = ModelBatch(models)
    batch(torch.ones(3)).sum().backward()
    norms = batch.clip_grad_norm_(0.5)
    for m, model in enumerate(models):
        model(torch.ones(3)).backward()
        close(norms[m], nn.utils.clip_grad_norm_(model.parameters(), 0.5), 1e-5)
        for key, p in model.named_parameters():
            close(batch.stacked_params[key].grad[m], p.grad, 1e-6)


def test_without_gradients_the_norms_are_zero() -> None:
    batch = ModelBatch(build("mlp"))
    assert torch.equal(batch.clip_grad_norm_(1.0), torch.zeros(M))


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (-1.0, r"Expected positive norms, got -1.0: choose a larger max_norm"),
        ("1", r"Expected a number as max_norm of model 0, got '1'"),
        (True, r"Expected a number as max_norm of model 0, got True"),
        ([1.0, 1.0, None, 1.0], r"Expected a number as max_norm of model 2, got None"),
        (0, r"Expected positive norms, got 0: choose"),
        (math.nan, r"Expected positive norms, got nan"),
        ([1, 1, 0, 1], r"Expected positive norms, got \[1, 1, 0, 1\]"),
        ([1.0, 2.0], r"Expected 4 norms \(one per model\), got 2: pass one value for all models or a list of 4"),
    ],
)
def test_norms_that_make_no_sense(limit: object, text: str) -> None:
    batch = ModelBatch(build("mlp"))
    backward(batch, batches(own=False)[0])
    before = [p.grad.clone() for p in batch.parameters()]
    with pytest.raises((ValueError, TypeError), match=text):
        batch.clip_grad_norm_(limit)
    assert all(torch.equal(p.grad, was) for p, was in zip(batch.parameters(), before, strict=True))
