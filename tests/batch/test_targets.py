"""What is one target for all models, told by the first step, holds for the run, on every road."""

from __future__ import annotations

import pytest
import torch
from oracle import M, assert_same_parameters, trained_alone
from torch import Tensor, nn
from torch.nn import functional as F

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.batch.targets import TargetForms, targets_at


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
