"""apply and reset_parameters of a batch do to each model what they do to it alone, to the same bits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import M
from torch import Tensor, nn
from torch.nn import functional as F

from mbkit import ModelBatch, OptimizerFactory

SEEDS = [7, 3, 9, 1]


class Net(nn.Module):
    """A network with tied weights, buffers, a Python setting and a tensor in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.25)
        self.last, self.scale, self.table = nn.Linear(5, 6), 1.0, torch.randn(6)
        self.last.weight = nn.Parameter(self.last.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)))) * self.scale + self.table


def xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("tanh"))
        nn.init.zeros_(module.bias)


def orthogonal(module: nn.Module) -> None:
    if getattr(module, "weight", None) is not None and module.weight.dim() == 2:
        nn.init.orthogonal_(module.weight)


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def kaiming_by_hand(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data = torch.randn_like(module.weight) / module.weight.shape[1] ** 0.5


def settings(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.5
    if isinstance(module, nn.BatchNorm1d):
        module.eval().requires_grad_(False)
    if isinstance(module, Net):
        module.scale = 3.0
        module.table.uniform_()


def made() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Net() for _ in range(M)]


def check_same(batch: ModelBatch, alone: list[nn.Module]) -> None:
    x = torch.randn(8, 6)
    out = batch(x)
    for m, model in enumerate(alone):
        mine = batch[m]
        for name, value in model.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-6, atol=1e-6)
        assert [p.requires_grad for p in mine.parameters()] == [p.requires_grad for p in model.parameters()]
        assert [module.training for module in mine.modules()] == [module.training for module in model.modules()]
        torch.testing.assert_close(out[m], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", [xavier, orthogonal, reset, kaiming_by_hand, settings])
def test_apply_does_what_it_does_alone(init) -> None:
    models = made()
    alone = copy.deepcopy(models)
    batch = ModelBatch(models, seeds=SEEDS)
    before = list(batch.parameters())
    assert batch.apply(init) is batch
    assert all(a is b for a, b in zip(before, batch.parameters(), strict=True))  # the optimizer's own
    for m, model in enumerate(alone):
        torch.manual_seed(SEEDS[m])
        model.apply(init)
        for name, value in model.state_dict().items():
            assert torch.equal(batch[m].state_dict()[name], value), name
        state = torch.get_rng_state()
        assert torch.equal(batch.streams.on("cpu")[m].get_state(), state)
    batch.eval()
    check_same(batch, [model.eval() for model in alone])


def test_reset_parameters_of_a_layer() -> None:
    models = made()
    alone = copy.deepcopy(models)
    for batch in (ModelBatch(models, seeds=SEEDS), pickle.loads(pickle.dumps(ModelBatch(models, seeds=SEEDS)))):
        twin = copy.deepcopy(batch)
        batch.get_submodule("last").reset_parameters()
        for m, model in enumerate(alone):
            torch.manual_seed(SEEDS[m])
            model.last.reset_parameters()
            assert torch.equal(batch[m].last.weight, model.last.weight)
            assert torch.equal(batch[m].first.weight, model.first.weight)
            assert torch.equal(twin[m].last.weight, models[m].last.weight)  # nobody else's
        batch[0].last.reset_parameters()  # a lone model's own
        assert torch.equal(batch[0].last.weight, alone[0].last.weight)


def test_each_model_may_get_another_setting_and_training_goes_on() -> None:
    models = made()
    alone, rates = copy.deepcopy(models), [0.1, 0.2, 0.3, 0.4]
    batch, given = ModelBatch(models, seeds=SEEDS), iter(rates)
    batch.apply(lambda module: setattr(module, "p", next(given)) if isinstance(module, nn.Dropout) else None)
    optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=0.01)
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    batch.compute_loss(batch(x), y, F.mse_loss).backward()
    batch.apply(xavier)
    optimizer.step()
    for m, model in enumerate(alone):
        torch.manual_seed(SEEDS[m])
        model.drop.p = rates[m]
        lone = torch.optim.Adam(model.parameters(), lr=0.01)
        F.mse_loss(model(x), y).backward()
        model.apply(xavier)
        lone.step()
        torch.testing.assert_close(batch[m].last.weight, model.last.weight, rtol=1e-4, atol=1e-5)


def test_frozen_models_stay_as_they_are() -> None:
    batch = ModelBatch(made(), seeds=SEEDS)
    before = [copy.deepcopy(model.state_dict()) for model in batch]
    batch.freeze(2)
    batch.apply(xavier)
    changed = [not torch.equal(batch[m].last.weight, before[m]["last.weight"]) for m in range(M)]
    assert changed == [True, True, False, True]
    assert torch.equal(batch.streams.on("cpu")[2].get_state(), torch.Generator().manual_seed(SEEDS[2]).get_state())


def wider(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight = nn.Parameter(torch.randn(9, 9))


def fails(module: nn.Module) -> None:
    nn.init.uniform_(next(module.parameters()))
    raise RuntimeError("the user's own")


@pytest.mark.parametrize(
    ("fn", "kind", "text"),
    [
        (wider, ValueError, r"makes 'first.weight' \[9, 9\] of torch.float32: do that to each model, before"),
        (lambda module: module.register_forward_hook(print), ValueError, "makes the hooks or layers of 'Net' others"),
        (fails, RuntimeError, "the user's own"),
    ],
)
def test_what_cannot_be_done_changes_nothing(fn, kind, text) -> None:
    batch = ModelBatch(made(), seeds=SEEDS)
    before, streams = copy.deepcopy(batch.state_dict()), batch.streams.state()
    with pytest.raises(kind, match=text):
        batch.apply(fn)
    after = batch.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert batch.streams.state().keys() >= streams.keys()
    assert torch.equal(batch.streams.on("cpu")[0].get_state(), torch.Generator().manual_seed(SEEDS[0]).get_state())
