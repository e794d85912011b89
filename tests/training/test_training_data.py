"""The same data for a batch and for each model alone, whatever draws; and every form of inputs and targets."""

import copy
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset
from training_by_hand import (
    CONFIGS,
    SEEDS,
    SGD,
    B,
    M,
    assert_same_parameters,
    batched,
    build,
    by_hand,
    loader,
)

from mbkit.batch.model_batch import ModelBatch
from mbkit.optim import OptimizerFactory
from mbkit.training import fit, fit_alone


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)  # conftest.py puts it back


class Augmented(Dataset):
    """Draws from every global generator there is, as augmentations do."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        noise = torch.rand(()).item() + random.random() + numpy.random.rand()
        return torch.full((4,), i + noise), i % 3


LOADERS = {
    "shuffle": lambda: loader(),
    "a generator": lambda: loader(generator=torch.Generator().manual_seed(5)),
    "a sampler's generator": lambda: loader(
        shuffle=False, sampler=RandomSampler(range(22), generator=torch.Generator().manual_seed(5))
    ),
    "a batch sampler": lambda: DataLoader(
        TensorDataset(torch.randn(22, 4), torch.randint(3, (22,))),
        batch_sampler=BatchSampler(RandomSampler(range(22)), B, drop_last=False),
    ),
    "augmentation": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_random_draws_of_models_and_data_leave_each_other_alone(make):
    def start():
        torch.manual_seed(1)
        random.seed(1)
        numpy.random.seed(1)

    def state():
        return torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist(), torch.rand(3)

    models = build(dropout=0.5)
    torch.manual_seed(9)
    data = make()
    start()
    epochs = [list(data) for _ in range(2)]  # what anybody who walks through the loader twice gets to see
    after = state()
    expected, losses, _ = by_hand(models, epochs)

    torch.manual_seed(9)
    data = make()
    batch, optimizer = batched(models)
    start()
    history = fit(batch, optimizer, data, cross_entropy, 2)
    assert_same_parameters(batch.models, expected)
    torch.testing.assert_close(history.loss, losses, rtol=0, atol=1e-10)
    now = state()
    assert torch.equal(now[0], after[0])
    assert now[1:3] == after[1:3]

    torch.manual_seed(9)
    data = make()
    start()
    history = fit_alone(models, SGD, CONFIGS, data, cross_entropy, 2, seeds=SEEDS)
    assert_same_parameters(models, expected, atol=0)
    now = state()
    assert torch.equal(now[0], after[0])
    assert now[1:3] == after[1:3]
    assert torch.equal(now[3], after[3])


def test_seeds_are_drawn_as_the_batch_draws_them():
    models, data = build(), loader()
    torch.manual_seed(3)
    batch = ModelBatch(models)
    fit(batch, OptimizerFactory(SGD).create_optimizer(batch, CONFIGS), data, cross_entropy)
    torch.manual_seed(3)
    fit_alone(models, SGD, CONFIGS, data, cross_entropy)
    assert_same_parameters(batch.models, models)


def test_what_a_callback_draws_changes_the_data_alike_and_no_mask():
    models, data = build(), loader()

    def callback(step):
        torch.rand(7)

    batch, optimizer = batched(models)
    torch.manual_seed(3)
    fit(batch, optimizer, data, cross_entropy, 2, callback=callback)
    torch.manual_seed(3)
    fit_alone(models, SGD, CONFIGS, data, cross_entropy, 2, seeds=SEEDS, callback=callback)
    assert_same_parameters(batch.models, models)


def test_data_that_cannot_be_drawn_again_is_refused():
    class Unknown:
        source = numpy.random.default_rng(0)

        def __iter__(self):
            yield torch.from_numpy(self.source.random((B, 4))), torch.zeros(B, dtype=torch.int64)

    with pytest.raises(ValueError, match="another first batch") as caught:
        fit_alone(build(), SGD, CONFIGS, Unknown(), cross_entropy, seeds=SEEDS)
    assert caught.value.history.steps_done == [1, 0, 0, 0]


@pytest.mark.parametrize("each_targets", [False, True])
@pytest.mark.parametrize("each_input", [False, True])
def test_batches_for_all_models_or_for_each(each_input, each_targets):
    models = build(dropout=0.0)
    xs, ys = torch.randn(4, M, B, 4), torch.randint(3, (4, M, B))
    pairs = [(x if each_input else x[0], y if each_targets else y[0]) for x, y in zip(xs, ys, strict=True)]
    expected = []
    for m in range(M):
        own = [(x[m if each_input else 0], y[m if each_targets else 0]) for x, y in zip(xs, ys, strict=True)]
        expected.append(by_hand(models, [own])[0][m])
    batch, optimizer = batched(models, shared_input=not each_input)
    together = fit(batch, optimizer, pairs, cross_entropy)
    alone = fit_alone(models, SGD, CONFIGS, pairs, cross_entropy, seeds=SEEDS, shared_input=not each_input)
    assert_same_parameters(batch.models, expected)
    assert_same_parameters(models, expected, atol=0)
    assert torch.equal(together.accuracy, alone.accuracy)


def test_targets_that_could_be_either_have_to_be_named():
    models, x, y = [nn.Linear(4, M) for _ in range(M)], torch.randn(M, 4), torch.randn(M, M)

    def error(outputs, targets):
        return (outputs - targets).square().mean()

    with pytest.raises(ValueError, match="shared_targets"):
        fit_alone(models, SGD, CONFIGS, [(x, y)], error)
    for shared in (True, False):
        expected = torch.stack([error(model(x), y if shared else y[m]).detach() for m, model in enumerate(models)])
        batch, optimizer = batched(models)
        together = fit(batch, optimizer, [(x, y)], error, shared_targets=shared)
        alone = fit_alone(copy.deepcopy(models), SGD, CONFIGS, [(x, y)], error, shared_targets=shared)
        torch.testing.assert_close(together.loss[0], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.loss[0], expected, rtol=0, atol=1e-12)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, shift):
        return self.layer(x) + shift, x.sum()


@pytest.mark.parametrize("pack", [lambda x, s: (x, s), lambda x, s: [x, s], lambda x, s: {"x": x, "shift": s}])
def test_several_inputs_and_nested_outputs(pack):
    models = [TwoInputs() for _ in range(M)]
    x, shift, y = torch.randn(B, 4), torch.randn(B, 1), torch.randn(B, 3)
    first = torch.stack([mse_loss(model(x, shift)[0], y) for model in models]).detach()

    def loss_fn(outputs, target):
        return mse_loss(outputs[0], target) + 0 * outputs[1]

    batch, optimizer = batched(models)
    together = fit(batch, optimizer, [(pack(x, shift), y)] * 3, loss_fn)
    alone = fit_alone(models, SGD, CONFIGS, [(pack(x, shift), y)] * 3, loss_fn)
    assert_same_parameters(batch.models, models)
    torch.testing.assert_close(together.loss, alone.loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone.loss[0], first, rtol=0, atol=1e-12)
    assert together.accuracy is None
    assert alone.accuracy is None
