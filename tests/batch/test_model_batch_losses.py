"""compute_loss and metrics against one loss per model, computed by itself; how targets are read, on every road."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from oracle import M, assert_same_parameters, build, close, trained_alone
from torch import Tensor, nn
from torch.nn import functional as F

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.batch.targets import TargetForms, targets_at

B, K = 6, 3


@pytest.fixture
def batch() -> ModelBatch:
    return ModelBatch(build("mlp"))


def outputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# ------------------------------------------------------------------ reductions
@pytest.mark.parametrize("own", [False, True], ids=["shared", "per-model"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_every_reduction(batch: ModelBatch, reduction: str, own: bool) -> None:
    out, y = outputs(M, B, K), torch.randint(K, (M, B) if own else (B,))
    loss = batch.compute_loss(out, y, F.cross_entropy, reduction)
    each = torch.stack([F.cross_entropy(out[m], y[m] if own else y) for m in range(M)])
    expected = each if reduction == "none" else getattr(each, reduction)()
    assert loss.shape == expected.shape
    close(loss, expected, 1e-14)
    (gradient,) = torch.autograd.grad(loss.sum(), out, retain_graph=True)
    (reference,) = torch.autograd.grad(expected.sum(), out)
    close(gradient, reference, 1e-14)
    close(batch.latest_losses, each, 1e-14)
    assert not batch.latest_losses.requires_grad
    assert batch.metrics() == {f"loss_model_{m}": loss for m, loss in enumerate(batch.latest_losses.tolist())}
    assert all(type(value) is float for value in batch.metrics().values())


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per-model"])
@pytest.mark.parametrize("classes", [2, 15, 16, 40], ids="{} classes".format)
@pytest.mark.parametrize("settings", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 1}], ids=str)
def test_cross_entropy_of_few_and_of_many_classes(batch: ModelBatch, classes: int, settings: dict, own: bool) -> None:
    """On a CPU their kernels differ, where the rows become shorter than a vector."""
    out, y = outputs(M, B, classes), torch.randint(classes, (M, B) if own else (B,))
    y[..., 0], y[..., 1] = -100 if "ignore_index" not in settings else 0, 1  # one row is left out of the mean
    loss_fn = partial(F.cross_entropy, **settings)
    losses = batch.compute_loss(out, y, loss_fn, "none")
    expected = torch.stack([loss_fn(out[m], y[m] if own else y) for m in range(M)])
    close(losses, expected, 1e-14)
    close(*(torch.autograd.grad(each.sum(), out)[0] for each in (losses, expected)), 1e-14)


def test_sum_is_the_default_and_metrics_start_empty(batch: ModelBatch) -> None:
    assert batch.latest_losses is None
    assert batch.metrics() == {}
    out, y = outputs(M, B, K), torch.randint(K, (B,))
    assert torch.equal(batch.compute_loss(out, y, F.cross_entropy), batch.compute_loss(out, y, F.cross_entropy, "sum"))


@pytest.mark.parametrize("reduction", ["Sum", "", "average", None])
def test_an_unknown_reduction(batch: ModelBatch, reduction: str) -> None:
    with pytest.raises(ValueError, match=f"Expected reduction 'sum', 'mean' or 'none', got {reduction!r}: choose one"):
        batch.compute_loss(outputs(M, B, K), torch.zeros(B, dtype=torch.long), F.cross_entropy, reduction)


# ------------------------------------------------------------------ targets
FORMS = {  # outputs, targets, whether each model has its own
    "classes for all": ((M, B, K), (B,), False),
    "classes a model": ((M, B, K), (M, B), True),
    "numbers for all": ((M, B, K), (B, K), False),
    "numbers a model": ((M, B, K), (M, B, K), True),
    "one number a sample, for all": ((M, B), (B,), False),
    "one number a sample, a model": ((M, B), (M, B), True),
    "B = M, classes for all": ((M, M, K), (M,), False),
    "pixels for all": ((M, B, K, 2, 2), (B, 2, 2), False),
    "pixels a model": ((M, B, K, 2, 2), (M, B, 2, 2), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_targets_is_told_by_their_shape(batch: ModelBatch, form: str) -> None:
    shape, target_shape, own = FORMS[form]
    out = outputs(*shape)
    if len(target_shape) < len(shape) + own - 1 and len(shape) > 2:
        y, loss_fn = torch.randint(K, target_shape), F.cross_entropy
    else:
        y, loss_fn = torch.randn(target_shape, dtype=torch.float64), F.mse_loss
    got = batch.compute_loss(out, y, loss_fn, "none")
    close(got, torch.stack([loss_fn(out[m], y[m] if own else y) for m in range(M)]), 1e-14)


AMBIGUOUS = [((M, M, K), (M, M)), ((M, M, M), (M, M)), ((M, M, K, 2), (M, M, 2))]
AMBIGUOUS += [((M, M, K), (M, M, K)), ((M, M), (M, M)), ((M,), (M,)), ((M,), (M, 2))]


@pytest.mark.parametrize(("shape", "target_shape"), AMBIGUOUS)
def test_targets_that_could_mean_both_are_asked_about(batch: ModelBatch, shape: tuple, target_shape: tuple) -> None:
    out, y = outputs(*shape), torch.randint(K, target_shape)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return out.square().sum() * y.square().sum()

    with pytest.raises(ValueError, match=r"could be one batch for all 4 models or one for each: say"):
        batch.compute_loss(out, y, loss_fn)
    assert batch.latest_losses is None
    for shared in (True, False):
        got = batch.compute_loss(out, y, loss_fn, "none", shared_targets=shared)
        close(got, torch.stack([loss_fn(out[m], y if shared else y[m]) for m in range(M)]), 1e-13)


@pytest.mark.parametrize("shape", [(B + 1,), (M, B + 1), (M + 1, B), (1, B), (M,)])
def test_targets_that_fit_neither_form(batch: ModelBatch, shape: tuple) -> None:
    said = f"Expected targets [{B}, …] for all models or [{M}, {B}, …] for each its own, got {list(shape)} for outputs"
    with pytest.raises(ValueError, match=re.escape(said) + r" \[4, 6, 3\]: pass one of the two forms"):
        batch.compute_loss(outputs(M, B, K), torch.zeros(shape, dtype=torch.long), F.cross_entropy)


def test_what_is_said_is_believed(batch: ModelBatch) -> None:
    """Sequences first, as CTC has them: no shape tells that the targets' first dimension is the batch."""
    out = outputs(M, 9, B, K).log_softmax(-1)
    targets = torch.randint(1, K, (B, 2)), torch.full((B,), 9), torch.full((B,), 2)

    def ctc(out: Tensor, y: tuple) -> Tensor:
        return F.ctc_loss(out, y[0], y[1], y[2])

    with pytest.raises(ValueError, match="shared_targets=True"):
        batch.compute_loss(out, targets, ctc)
    got = batch.compute_loss(out, targets, ctc, "none", shared_targets=True)
    close(got, torch.stack([ctc(out[m], targets) for m in range(M)]), 1e-13)
    with pytest.raises(ValueError, match=rf"Expected targets \[{M}, …\], as shared_targets=False says, got \[6, 2\]"):
        batch.compute_loss(out, targets, ctc, shared_targets=False)


def test_nested_outputs_and_targets(batch: ModelBatch) -> None:
    out = {"a": outputs(M, B, K), "b": [outputs(M, B), None]}
    y = {"class": torch.randint(K, (B,)), "number": torch.randn(M, B, dtype=torch.float64), "weight": 0.3}

    def loss_fn(out: dict, y: dict) -> Tensor:
        return F.cross_entropy(out["a"], y["class"]) + y["weight"] * F.mse_loss(out["b"][0], y["number"])

    got = batch.compute_loss(out, y, loss_fn, "none")
    for m in range(M):
        mine = {"a": out["a"][m], "b": [out["b"][0][m], None]}
        close(got[m], loss_fn(mine, {**y, "number": y["number"][m]}), 1e-14)


# ------------------------------------------------------------------ bad inputs
@pytest.mark.parametrize(
    ("loss_fn", "kind", "text"),
    [
        (lambda out, y: 3.0, TypeError, "to be a tensor, got float: return the tensor itself, without item"),
        (lambda out, y: (out - y).mean().item(), TypeError, "to be a tensor, got float"),
        (nn.MSELoss(reduction="none"), ValueError, r"one loss a model, got a tensor \[6, 3\]: let loss_fn average"),
    ],
)
def test_a_loss_that_is_not_one_number(batch: ModelBatch, loss_fn, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        batch.compute_loss(outputs(M, B, K), torch.randn(B, K, dtype=torch.float64), loss_fn)
    assert batch.latest_losses is None


def test_a_target_out_of_range_is_said_in_torchs_words(batch: ModelBatch) -> None:
    with pytest.raises(IndexError, match=r"the loss function.*Target 9 is out of bounds"):
        batch.compute_loss(outputs(M, B, K), torch.full((B,), 9), F.cross_entropy)


@pytest.mark.parametrize("out", [None, 3.0, [], {"a": None}])
def test_outputs_that_are_no_tensors(batch: ModelBatch, out: object) -> None:
    with pytest.raises(TypeError, match=r"Expected outputs made of tensors, got .*: pass what the batch returned"):
        batch.compute_loss(out, torch.zeros(B), F.mse_loss)


@pytest.mark.parametrize("shape", [(B, K), (), (M + 1, B)])
def test_outputs_of_another_batch(batch: ModelBatch, shape: tuple) -> None:
    with pytest.raises(ValueError, match=rf"Expected outputs \[{M}, B, …\] .*: pass what the batch returned, outputs"):
        batch.compute_loss(torch.zeros(shape), torch.zeros(B), F.mse_loss)


# ------------------------------------------------------------------ one reading of targets holds for a run
class WithLoss(nn.Module):
    """Returns a number first, as models of Hugging Face do, and then its logits."""

    def __init__(self, squeeze: bool) -> None:
        super().__init__()
        self.layer, self.squeeze = nn.Linear(3, 1, dtype=torch.float64), squeeze

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.layer(x)
        return out.square().mean(), out[:, 0] if self.squeeze else out


ROADS = [{"chunk_size": None}, {"chunk_size": 2}, {"chunk_size": 1}, {}]


@pytest.mark.parametrize("road", ROADS, ids=str)
def test_a_last_batch_of_as_many_rows_as_models_is_read_as_those_before_it(road: dict) -> None:
    torch.manual_seed(0)
    models = [WithLoss(squeeze=True) for _ in range(M)]
    pairs = [(torch.randn(n, 3, dtype=torch.float64), torch.randn(n, dtype=torch.float64)) for n in (7, 7, M)]

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return out[0] + F.mse_loss(out[1], y)

    alone = trained_alone(models, pairs, loss_fn=loss_fn, configs={"lr": 0.3})
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.3)
    fit(batch, optimizer, pairs, loss_fn, progress=False, **road)
    assert_same_parameters(batch.models, alone, 1e-12)


@pytest.mark.parametrize("road", ROADS, ids=str)
def test_a_first_batch_that_could_mean_both_is_an_error_on_every_road(road: dict) -> None:
    batch = ModelBatch([WithLoss(squeeze=True) for _ in range(M)])
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.3)
    pairs = [(torch.randn(M, 3, dtype=torch.float64), torch.randn(M, dtype=torch.float64))]
    with pytest.raises(ValueError, match="shared_targets=True or shared_targets=False"):
        fit(batch, optimizer, pairs, lambda out, y: F.mse_loss(out[1], y), progress=False, **road)


def test_forms_are_found_once_and_each_target_has_its_own() -> None:
    forms = TargetForms()
    targets = {"all": torch.zeros(8, 2), "own": torch.arange(M * 8).view(M, 8), "number": 3}
    assert forms.of(targets, (M, 8, 5), M) == (True, False)
    one = targets_at(targets, (True, False), 2)
    assert one["all"] is targets["all"]
    assert torch.equal(one["own"], targets["own"][2])
    assert one["number"] == 3
    assert forms.of((torch.zeros(M), torch.zeros(M, M)), (M, M), M) == (True, False)
    with pytest.raises(ValueError, match=r"as the first targets were, got \[8, 2\]"):
        forms.of((torch.zeros(8), torch.zeros(8, 2)), (M, 8), M)


@pytest.mark.parametrize("said", ["no", 1, 0, "False"])
def test_what_is_not_a_bool_is_refused(said: object) -> None:
    batch = ModelBatch([nn.Linear(2, 1) for _ in range(M)])
    out = batch(torch.randn(3, 2))
    with pytest.raises(TypeError, match="Expected shared_targets True, False or None, got"):
        batch.compute_loss(out, torch.zeros(3, 1), F.mse_loss, shared_targets=said)
