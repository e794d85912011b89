"""Each planted defect does what its description says, and nothing else."""

import pytest
import torch
from torch import nn

from mbkit import ModelBatch
from mbkit.verify.faults import FAULTS, StaleGradientOptimizer


def make(num_models=3):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double() for _ in range(num_models)]
    batches = [(torch.randn(6, 4).double(), torch.randint(2, (6,))) for _ in range(8)]
    return models, batches


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_stale_gradients_are_those_of_a_model_that_is_never_cleared(optimizer_cls):
    models, batches = make()
    rates = [0.01, 0.05, 0.2]
    batch = ModelBatch(models)
    optimizer = StaleGradientOptimizer(batch, optimizer_cls, [{"lr": rate} for rate in rates])
    for x, y in batches:
        optimizer.zero_grad()
        batch.compute_loss(batch(x), y, nn.functional.cross_entropy).backward()
        optimizer.step()
    for m, (model, rate) in enumerate(zip(models, rates, strict=True)):
        alone = optimizer_cls(model.parameters(), lr=rate)
        for x, y in batches:  # and no zero_grad
            nn.functional.cross_entropy(model(x), y).backward()
            alone.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(batch.stacked_params[name][m], parameter, rtol=0, atol=1e-12)
            torch.testing.assert_close(batch.stacked_params[name].grad[m], parameter.grad, rtol=0, atol=1e-12)


def test_the_stale_optimizer_is_right_where_the_user_clears_the_stacked_gradients():
    models, batches = make(2)
    batch = ModelBatch(models)
    optimizer = StaleGradientOptimizer(batch, torch.optim.Adam, [{"lr": 0.01}, {"lr": 0.1}])
    for x, y in batches:
        batch.zero_grad()  # what the optimizer's own zero_grad leaves out
        batch.compute_loss(batch(x), y, nn.functional.cross_entropy).backward()
        optimizer.step()
    for m, (model, rate) in enumerate(zip(models, (0.01, 0.1), strict=True)):
        alone = torch.optim.Adam(model.parameters(), lr=rate)
        for x, y in batches:
            alone.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            alone.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(batch.stacked_params[name][m], parameter, rtol=0, atol=1e-12)


def test_its_zero_grad_clears_the_copies_only():
    models, [(x, y), *_] = make()
    batch = ModelBatch(models)
    optimizer = StaleGradientOptimizer(batch, torch.optim.SGD, [{"lr": 0.1}] * 3)
    batch.compute_loss(batch(x), y, nn.functional.cross_entropy).backward()
    optimizer.step()
    before = {name: parameter.grad.clone() for name, parameter in batch.stacked_params.items()}
    assert all(copy.grad is not None for copies in optimizer.copies for copy in copies)
    optimizer.zero_grad()
    assert all(copy.grad is None for copies in optimizer.copies for copy in copies)
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in batch.stacked_params.items())


def test_learning_rates_can_be_changed_mid_run():
    models, [(x, y), *_] = make()
    batch = ModelBatch(models)
    optimizer = StaleGradientOptimizer(batch, torch.optim.SGD, [{"lr": 0.1}] * 3)
    optimizer.param_groups[1]["lr"] = 0.0
    before = batch.stacked_params["0.weight"].detach().clone()
    batch.compute_loss(batch(x), y, nn.functional.cross_entropy).backward()
    optimizer.step()
    moved = (batch.stacked_params["0.weight"] != before).flatten(1).any(1)
    assert moved.tolist() == [True, False, True]


def test_a_wrong_number_of_configs():
    batch = ModelBatch(make()[0])
    with pytest.raises(ValueError, match=r"Expected 3 configs \(one per model\), got 2"):
        StaleGradientOptimizer(batch, torch.optim.SGD, [{"lr": 0.1}] * 2)


def test_every_fault_says_what_it_plants():
    assert {"stale-gradients", "other-weights", "other-order"} <= set(FAULTS)
    assert all(len(text) > 20 for text in FAULTS.values())
