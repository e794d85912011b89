"""ModelBatch against M models trained alone: what is stacked, what training gives, seeds, and the models given."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import (
    NETS,
    SEEDS,
    M,
    assert_same_models,
    assert_unchanged,
    batches,
    build,
    close,
    snapshot,
    train_alone,
    train_batch,
)
from torch import Tensor, nn

from mbkit import ModelBatch

X, Y = torch.zeros(2, 3), torch.zeros(2, 2)


# ------------------------------------------------------------------ training
@pytest.mark.parametrize("own", [False, True], ids=["shared", "per-model"])
@pytest.mark.parametrize(
    ("name", "count"), [*((name, M) for name in NETS), ("mlp", 1), ("dropout", 1), ("batchnorm", 1)]
)
def test_training_equals_each_model_alone(name: str, count: int, own: bool) -> None:
    models, data = build(name, count), batches(own, count)
    batch = ModelBatch(models, shared_input=not own, seeds=SEEDS[:count])
    state = torch.get_rng_state()
    losses = train_batch(batch, data)
    assert torch.equal(torch.get_rng_state(), state)
    close(losses, train_alone(models, data, own))
    assert_same_models(batch, models)
    taken, x = batch.eval().models, data[0][0]
    together = batch(x)
    for m, model in enumerate(models):
        expected = model.eval()(x[m] if own else x)
        close(together[m], expected)
        close(taken[m](x[m] if own else x), expected)


def test_a_model_without_parameters() -> None:
    models = [nn.Sequential(nn.ReLU(), nn.Dropout(0.5)) for _ in range(M)]
    batch, x = ModelBatch(models, seeds=SEEDS), torch.randn(5, 3)
    got = batch(x)
    assert list(batch.parameters()) == []
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        assert torch.equal(got[m], model(x))


def test_dropout_rates_and_other_floats_may_differ() -> None:
    def net(m: int) -> nn.Module:
        layers = nn.Linear(3, 8), nn.LeakyReLU(0.1 * m), nn.BatchNorm1d(8, eps=10.0**-m, momentum=0.1 + 0.2 * m)
        return nn.Sequential(*layers, nn.Dropout([0, 0.9, 1.0, 0.5][m]), nn.Linear(8, 2)).double()

    models, data = [net(m) for m in range(M)], batches(own=False)
    batch = ModelBatch(models, seeds=SEEDS)
    losses = train_batch(batch, data)
    assert [type(model[3].p) for model in models] == [int, float, float, float]  # the given models' own
    close(losses, train_alone(models, data, own=False))
    assert_same_models(batch, models)
    assert [batch[m][3].p for m in range(M)] == [0, 0.9, 1.0, 0.5]
    assert [batch[m][1].negative_slope for m in range(M)] == [model[1].negative_slope for model in models]


# ------------------------------------------------------------------ what is stacked
@pytest.mark.parametrize("name", NETS)
def test_stacks_have_the_users_names_order_and_shapes_and_are_all_parameters(name: str) -> None:
    models = build(name)
    batch = ModelBatch(models)
    for stacks, named in (
        (batch.stacked_params, [dict(model.named_parameters()) for model in models]),
        (batch.stacked_buffers, [dict(model.named_buffers()) for model in models]),
    ):
        assert list(stacks) == list(named[0])
        for key, stack in stacks.items():
            assert torch.equal(stack, torch.stack([own[key] for own in named]))
            assert stack.requires_grad == named[0][key].requires_grad
            assert stack.dtype == named[0][key].dtype
    parameters = list(batch.parameters())
    assert all(p is q for p, q in zip(parameters, batch.stacked_params.values(), strict=True))
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in parameters)
    assert sum(p.numel() for p in parameters) == M * sum(p.numel() for p in models[0].parameters())
    assert batch.num_models == len(batch) == M
    assert batch.shared_input is True
    assert f"{M} x {type(models[0]).__name__}, shared_input=True" in repr(batch)


def test_models_come_in_any_iterable() -> None:
    models = build("mlp")
    for given in (iter(models), tuple(models), nn.ModuleList(models), dict(enumerate(models)).values()):
        batch = ModelBatch(given)
        assert torch.equal(batch.stacked_params["2.bias"], torch.stack([model[2].bias for model in models]))


# ------------------------------------------------------------------ the models given, and the models taken out
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_the_given_models_never_change(name: str, training: bool) -> None:
    models = build(name)
    data = batches(own=False)
    for model in models:
        model(data[0][0]).sum().backward()
        model.train(training)
        model.register_forward_hook(_double)
    before = [snapshot(model) for model in models]
    batch = ModelBatch(models, seeds=SEEDS)
    assert batch.training is training
    batch.train()
    train_batch(batch, data)
    batch.eval().float()
    batch.requires_grad_(False)
    state = torch.get_rng_state()
    batch.models, batch.get_model_states(), batch.double()(data[0][0])
    assert torch.equal(torch.get_rng_state(), state)
    for model, was in zip(models, before, strict=True):
        assert_unchanged(model, was)


def _double(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("name", NETS)
def test_a_model_taken_out_stands_alone(name: str) -> None:
    models, data = build(name), batches(own=False)
    batch = ModelBatch(models, seeds=SEEDS)
    train_batch(batch, data[:3])
    train_alone(models, data[:3], own=False)
    before = snapshot(batch)
    taken = batch[1]
    assert type(taken) is type(models[1])
    assert list(taken.state_dict()) == list(models[1].state_dict())
    assert {n: p.requires_grad for n, p in taken.named_parameters()} == {
        n: p.requires_grad for n, p in models[1].named_parameters()
    }
    # It goes on alone as the model that was always alone does.
    lone = copy.deepcopy(models[1])
    for model in (taken, lone):
        train_alone([model], data[3:], own=False, seeds=[5])
    for key, value in lone.state_dict().items():
        close(taken.state_dict()[key], value, what=key)
    assert_unchanged(batch, before)


def test_indexing_follows_lists() -> None:
    models = build("mlp")
    batch = ModelBatch(models)
    for index in (0, 1, -1, -M, torch.tensor(2)):
        assert torch.equal(batch[index][0].weight, models[index][0].weight)
    assert len(batch.models) == len(list(batch)) == M
    for taken, again, given in zip(batch.models, batch, models, strict=True):
        assert torch.equal(taken[0].weight, given[0].weight)
        assert torch.equal(again[0].weight, given[0].weight)
        assert taken[0].weight is not again[0].weight
    for index in (M, -M - 1):
        with pytest.raises(IndexError, match=rf"number from 0 to {M - 1}, got {index}"):
            batch[index]
    for index in (slice(0, 2), "0", 1.0, None):
        with pytest.raises(TypeError, match=f"number from 0 to {M - 1}, got"):
            batch[index]


def test_a_model_with_a_train_of_its_own() -> None:
    class Half(nn.Sequential):
        """Keeps its BatchNorm in evaluation, as fine-tuning does."""

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self[1].training = False
            return self

    models, data = [Half(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(M)], batches(own=False)
    for model in models:
        model.double().train()
    batch = ModelBatch(models)
    assert [m.training for m in batch.eval().modules()] == [False] * 4
    assert [m.training for m in batch.train().modules()] == [True, True, False, True]
    losses = train_batch(batch, data)
    close(losses, train_alone(models, data, own=False))
    assert_same_models(batch, models)
    assert [m.training for m in batch[0].modules()] == [True, True, False, True]


# ------------------------------------------------------------------ seeds
def test_model_m_draws_what_it_draws_alone_after_its_seed() -> None:
    models, x = build("dropout", dtype=torch.float32), torch.randn(7, 3)
    batch = ModelBatch(models, seeds=SEEDS)
    got = [batch(x) for _ in range(3)]
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        for step in range(3):
            torch.testing.assert_close(got[step][m], model(x))
    masks = [ModelBatch([nn.Dropout(0.5) for _ in range(M)], seeds=SEEDS)(torch.ones(64)) for _ in range(2)]
    assert torch.equal(masks[0], masks[1])
    for m, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        assert torch.equal(masks[0][m], nn.Dropout(0.5)(torch.ones(64)))


def test_seeds_are_drawn_from_the_default_generator_when_absent() -> None:
    models = build("dropout")
    torch.manual_seed(3)
    first = ModelBatch(models)
    second = ModelBatch(models)
    torch.manual_seed(3)
    again = ModelBatch(models)
    assert first.seeds == again.seeds
    assert len({*first.seeds, *second.seeds}) == 2 * M
    assert torch.equal(first(X.double()), again(X.double()))


def test_a_parameter_keeps_the_memory_order_that_it_has_alone() -> None:
    """Masks are drawn in memory order, and a model may drop weights."""

    class DropConnect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5).t())

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, nn.functional.dropout(self.weight, 0.5))

    models, x = [DropConnect() for _ in range(M)], torch.randn(4, 3)
    batch = ModelBatch(models, seeds=SEEDS)
    assert batch[1].weight.stride() == models[1].weight.stride() == (1, 5)
    got = batch(x)
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        close(got[m], model(x), 1e-6)
