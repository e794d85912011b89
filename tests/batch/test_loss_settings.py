"""Settings of a loss, one for all models or one per model, against the loss of each model by itself."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any

import pytest
import torch
from oracle import close
from torch import Tensor, nn
from torch.nn import functional as F

from mbkit import ModelBatch
from mbkit.batch.loss_settings import LossSettings

M, B, K = 4, 6, 3
RATES = [0.1, 0.3, 0.0, 0.7]
SLOWLY = "runs model by model: torch.vmap cannot run it"


def vae(out: Tensor, y: Tensor, beta: float) -> Tensor:
    return F.cross_entropy(out, y) + beta * out.square().mean()


def temperature(out: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    return F.cross_entropy(out / temperature, y)


def huber(out: Tensor, y: Tensor, *, delta: float) -> Tensor:
    return F.huber_loss(out, F.one_hot(y, K).double(), delta=delta)


def focal(out: Tensor, y: Tensor, gamma: float, weight: Tensor) -> Tensor:
    log_p = out.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return (-((1 - log_p.exp()) ** gamma) * log_p * weight[y]).mean()


def makes_tensors(out: Tensor, y: Tensor, beta: float) -> Tensor:
    filled, listed = torch.full((K,), beta, dtype=out.dtype), torch.tensor([1.0, beta, 2.0], dtype=out.dtype)
    return (out * filled).sum() + (out.clamp(min=beta) * listed).sum() - 2**beta * (1 - beta) // 0.3


def arithmetic(out: Tensor, y: Tensor, beta: float) -> Tensor:
    """A number on either side, as an operator and a function, of other types too."""
    half, whole = out.bfloat16(), y - 1
    sums = beta * out + out / (1 + beta) - (out - beta) * (beta - out) + torch.mul(out, beta).add(beta).sub(2 * beta)
    rest = torch.sub(out, beta, alpha=2) * (beta + out.float()).mean() + (whole * beta + whole / (beta + 3)).mean()
    return (sums + rest).mean() + (half * beta + beta - half / (beta + 3)).double().mean()


def dropped(out: Tensor, y: Tensor, p: float) -> Tensor:
    return F.cross_entropy(F.dropout(out, p), y)


def outside(out: Tensor, y: Tensor, beta: float) -> Tensor:
    return math.exp(beta) * F.cross_entropy(out, y)


def branches(out: Tensor, y: Tensor, **settings: float) -> Tensor:
    return F.cross_entropy(out, y) * (2.0 if settings["beta"] > 0.2 else settings["beta"])


def masked(out: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    never = torch.full_like(out[:, :1], -torch.inf)
    return F.cross_entropy(torch.cat([out, never], 1), y, label_smoothing=label_smoothing)


def counts(out: Tensor, y: Tensor, k: int) -> Tensor:
    return out.topk(k).values.mean()


class Module(nn.Module):
    def forward(self, out: Tensor, y: Tensor, beta: float) -> Tensor:
        return vae(out, y, beta)


WEIGHTS = torch.linspace(0.2, 2.0, M * K, dtype=torch.float64).view(M, K)
CASES: dict[str, tuple[Any, dict[str, Any], list[dict[str, Any]]]] = {  # as given, and each model's own
    "label smoothing": (F.cross_entropy, {"label_smoothing": RATES}, [{"label_smoothing": r} for r in RATES]),
    "label smoothing, ignored labels": (
        F.cross_entropy,
        {"label_smoothing": RATES, "ignore_index": 1, "reduction": "sum"},
        [{"label_smoothing": r, "ignore_index": 1, "reduction": "sum"} for r in RATES],
    ),
    "label smoothing of classes that cannot be": (
        masked,
        {"label_smoothing": RATES},
        [{"label_smoothing": r} for r in RATES],
    ),
    "one for all": (F.cross_entropy, {"label_smoothing": 0.1}, [{"label_smoothing": 0.1}] * M),
    "the same for all": (F.cross_entropy, {"label_smoothing": (0.1,) * M}, [{"label_smoothing": 0.1}] * M),
    "beta of a VAE": (vae, {"beta": tuple(RATES)}, [{"beta": r} for r in RATES]),
    "whole numbers": (vae, {"beta": range(M)}, [{"beta": m} for m in range(M)]),
    "a module": (Module(), {"beta": RATES}, [{"beta": r} for r in RATES]),
    "temperature": (temperature, {"temperature": [1.0, 2.0, 0.5, 3.0]}, [{"temperature": t} for t in (1, 2, 0.5, 3)]),
    "huber": (huber, {"delta": torch.tensor(RATES, dtype=torch.float64) + 1}, [{"delta": r + 1} for r in RATES]),
    "class weights": (F.cross_entropy, {"weight": WEIGHTS}, [{"weight": w} for w in WEIGHTS]),
    "class weights for all": (F.cross_entropy, {"weight": WEIGHTS[0]}, [{"weight": WEIGHTS[0]}] * M),
    "two, numpy, a list of tensors": (
        focal,
        {"gamma": WEIGHTS[:, 0].numpy(), "weight": list(WEIGHTS)},
        [{"gamma": w[0].item(), "weight": w} for w in WEIGHTS],
    ),
    "numbers made tensors": (makes_tensors, {"beta": RATES}, [{"beta": r} for r in RATES]),
    "arithmetic": (arithmetic, {"beta": RATES}, [{"beta": r} for r in RATES]),
    "random numbers": (dropped, {"p": RATES}, [{"p": r} for r in RATES]),
    "outside torch": (outside, {"beta": RATES}, [{"beta": r} for r in RATES]),
    "branches": (branches, {"beta": RATES}, [{"beta": r} for r in RATES]),
    "counts": (counts, {"k": [1, 2, 3, 1]}, [{"k": k} for k in (1, 2, 3, 1)]),
}
IN_TURN = {"outside torch", "branches", "counts"}


@pytest.fixture
def batch() -> ModelBatch:
    return ModelBatch([nn.Linear(3, 2) for _ in range(M)], seeds=range(M))


def outputs(classes: int = K) -> Tensor:
    return torch.randn(M, B, classes, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_each_model_by_itself(batch: ModelBatch, case: str) -> None:
    loss_fn, given, own = CASES[case]
    out, y = outputs(), torch.randint(K, (B,))
    lone = out.detach().clone().requires_grad_()
    for step in range(2):  # the second time it is known how to run it
        with pytest.warns(UserWarning, match=SLOWLY) if case in IN_TURN and not step else contextlib.nullcontext():
            losses = batch.compute_loss(out, y, loss_fn, "none", loss_settings=given)
        (gradient,) = torch.autograd.grad(losses.sum(), out)
        for m in range(M):
            torch.manual_seed(m)
            for _ in range(step + 1):
                expected = loss_fn(lone[m], y, **own[m])
            close(losses[m], expected, 1e-13, f"loss of model {m}")
            close(gradient[m], torch.autograd.grad(expected, lone)[0][m], 1e-13, f"gradient of model {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_as_exact_as_alone_in_every_dtype(batch: ModelBatch, dtype: torch.dtype) -> None:
    def loss_fn(out: Tensor, y: Tensor, beta: float) -> Tensor:
        scaled, shifted = (beta * out).double(), (out / (1 + beta) - beta).double()
        return scaled.square().mean() + shifted.abs().mean() + (y * beta).double().mean()

    out, y = outputs().detach().to(dtype), torch.randint(K, (B,))
    losses = batch.compute_loss(out, y, loss_fn, "none", loss_settings={"beta": RATES})
    for m, rate in enumerate(RATES):
        close(losses[m], loss_fn(out[m], y, rate), 1e-6)


def test_a_model_at_nan_is_no_reason_to_run_model_by_model(batch: ModelBatch) -> None:
    out, y = outputs().detach(), torch.randint(K, (B,))
    out[1] = torch.nan
    for _ in range(2):
        losses = batch.compute_loss(out, y, vae, "none", loss_settings={"beta": RATES})
        assert losses.isnan().tolist() == [False, True, False, False]
        close(losses[3], vae(out[3], y, RATES[3]), 1e-13)
    with pytest.warns(UserWarning, match=SLOWLY):
        losses = batch.compute_loss(out, y, outside, "none", loss_settings={"beta": RATES})
    close(losses[3], outside(out[3], y, RATES[3]), 1e-13)


def test_a_part_of_the_models_has_their_settings() -> None:
    settings = LossSettings({"label_smoothing": RATES, "weight": WEIGHTS, "reduction": "sum"}, F.cross_entropy, M)
    part = settings.of_models(slice(1, 3))
    assert LossSettings.made_of(part, F.cross_entropy, 2) is part
    for whole, row in ((1, 0), (2, 1)):
        mine, own = settings.of_model(whole), part.of_model(row)
        assert mine == {"label_smoothing": RATES[whole], "weight": mine["weight"], "reduction": "sum"}
        assert own == mine | {"weight": own["weight"]}
        assert torch.equal(own["weight"], WEIGHTS[whole])


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"label_smooting": 0.1}, ValueError, "by name, got 'label_smooting'. Did you mean 'label_smoothing'?"),
        ({"label_smoothing": [0.1] * 3}, ValueError, "Expected 4 values (one per model) as 'label_smoothing'"),
        ({"reduction": ["sum"] * M}, TypeError, "Expected numbers or tensors as 'reduction' in loss_settings"),
        ({"weight": torch.ones(K, requires_grad=True)}, ValueError, "got a tensor that is trained as 'weight'"),
        ({"weight": torch.ones(M)}, ValueError, "could be one value for all models or one per model"),
        (0.1, TypeError, "Expected loss_settings as a dict of names and values, got 0.1"),
    ],
)
def test_settings_that_are_refused(batch: ModelBatch, given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        batch.compute_loss(outputs(M), torch.randint(M, (B,)), F.cross_entropy, loss_settings=given)
    assert batch.latest_losses is None


def test_a_module_that_takes_no_settings(batch: ModelBatch) -> None:
    text = "that the loss function CrossEntropyLoss takes by name, got 'label_smoothing'. It takes none."
    with pytest.raises(ValueError, match=text):
        batch.compute_loss(
            outputs(), torch.randint(K, (B,)), nn.CrossEntropyLoss(), loss_settings={"label_smoothing": 0.1}
        )
