"""The same data for a batch and for each model alone, whatever draws; and every form of inputs and targets."""

import copy
import functools
import random
import weakref

import numpy
import pytest
import torch
from oracle import (
    CONFIGS,
    SEEDS,
    B,
    M,
    assert_same_parameters,
    batched,
    classifiers,
    close,
    loader,
    next_draws,
    points,
    seed_all,
    train_alone,
    trained_alone,
)
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from mbkit.batch.model_batch import ModelBatch
from mbkit.optim import OptimizerFactory
from mbkit.training import fit, fit_alone

by_hand = functools.partial(trained_alone, loss_fn=cross_entropy, configs=CONFIGS)


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
    def made():
        torch.manual_seed(9)
        data = make()
        seed_all(1)
        return data

    models = classifiers(dropout=0.5)
    data = made()
    epochs = [list(data) for _ in range(2)]  # what anybody who walks through the loader twice gets to see
    after, expected = next_draws(), copy.deepcopy(models)
    losses = train_alone(expected, epochs[0] + epochs[1], loss_fn=cross_entropy, configs=CONFIGS)
    batch, optimizer = batched(models)
    history = fit(batch, optimizer, made(), cross_entropy, 2)
    assert next_draws() == after
    assert_same_parameters(batch.models, expected)
    close(history.loss, losses)
    fit_alone(models, SGD, CONFIGS, made(), cross_entropy, 2, seeds=SEEDS)
    assert next_draws() == after
    assert_same_parameters(models, expected)


def test_seeds_are_drawn_as_the_batch_draws_them():
    models, data = classifiers(), loader()
    torch.manual_seed(3)
    batch = ModelBatch(models)
    fit(batch, OptimizerFactory(SGD).create_optimizer(batch, CONFIGS), data, cross_entropy)
    torch.manual_seed(3)
    fit_alone(models, SGD, CONFIGS, data, cross_entropy)
    assert_same_parameters(batch.models, models)


def test_what_a_callback_draws_changes_the_data_alike_and_no_mask():
    models, data = classifiers(), loader()

    def callback(step):
        torch.rand(7)

    batch, optimizer = batched(models)
    torch.manual_seed(3)
    fit(batch, optimizer, data, cross_entropy, 2, callback=callback)
    torch.manual_seed(3)
    fit_alone(models, SGD, CONFIGS, data, cross_entropy, 2, seeds=SEEDS, callback=callback)
    assert_same_parameters(batch.models, models)


class Generated:
    """Draws from a generator that nobody else knows of, and never the same again."""

    def __init__(self):
        self.source, self.drawn = numpy.random.default_rng(0), []

    def __iter__(self):
        for _ in range(4):
            x = torch.from_numpy(self.source.random((B, 4)))
            self.drawn.append((x, (3 * x[:, 0]).long()))
            yield self.drawn[-1]


def test_data_that_cannot_be_drawn_again_is_the_same_for_all_models():
    models, data = classifiers(), Generated()
    untrained = copy.deepcopy(models)
    fit_alone(models, SGD, CONFIGS, data, cross_entropy, 2, seeds=SEEDS)
    assert len(data.drawn) == 8
    assert_same_parameters(models, by_hand(untrained, data.drawn))


@pytest.mark.slow  # two processes start
def test_workers_that_stay_from_epoch_to_epoch():
    def make():
        torch.manual_seed(9)
        data = DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
        torch.manual_seed(1)
        return data

    models, data = classifiers(), make()
    expected = by_hand(models, [pair for _ in range(2) for pair in data])
    fit_alone(models, SGD, CONFIGS, make(), cross_entropy, 2, seeds=SEEDS)
    assert_same_parameters(models, expected)


class Noisy(nn.Module):
    """Draws from Python's and NumPy's global generators, beside torch's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        noise = random.random() + numpy.random.rand() + torch.rand(())
        return self.layer(x + noise)


def test_what_a_model_draws_from_python_and_numpy_is_what_it_draws_alone():
    models = [Noisy() for _ in range(M)]
    expected = copy.deepcopy(models)
    seed_all(1)
    data = list(LOADERS["augmentation"]())  # what the models draw does not change it
    seed_all(1)
    fit_alone(models, SGD, CONFIGS, LOADERS["augmentation"](), cross_entropy, seeds=SEEDS)
    train_alone(expected, data, loss_fn=cross_entropy, configs=CONFIGS)
    assert_same_parameters(models, expected)


class Writes(nn.Module):
    """Changes its inputs in place, as a normalisation may."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.mul_(2.0))


def test_a_model_that_writes_into_its_inputs_changes_them_for_no_other():
    models, pairs = [Writes() for _ in range(M)], points(3)
    expected = []
    for m in range(M):
        untouched = [(x.clone(), y) for x, y in pairs]
        expected += by_hand(models[m : m + 1], untouched, configs=CONFIGS[m])
    fit_alone(models, SGD, CONFIGS, pairs, cross_entropy, seeds=SEEDS)
    assert_same_parameters(models, expected)


@pytest.mark.parametrize("each_targets", [False, True])
@pytest.mark.parametrize("each_input", [False, True])
def test_batches_for_all_models_or_for_each(each_input, each_targets):
    models = classifiers(dropout=0.0)
    xs, ys = torch.randn(4, M, B, 4), torch.randint(3, (4, M, B))
    pairs = [(x if each_input else x[0], y if each_targets else y[0]) for x, y in zip(xs, ys, strict=True)]
    expected = []
    for m in range(M):
        own = [(x[m if each_input else 0], y[m if each_targets else 0]) for x, y in zip(xs, ys, strict=True)]
        expected.append(by_hand(models, own)[m])
    batch, optimizer = batched(models, shared_input=not each_input)
    together = fit(batch, optimizer, pairs, cross_entropy)
    alone = fit_alone(models, SGD, CONFIGS, pairs, cross_entropy, seeds=SEEDS, shared_input=not each_input)
    assert_same_parameters(batch.models, expected)
    assert_same_parameters(models, expected)
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


def test_no_models_graph_outlives_its_turn():
    alive = []

    def loss_fn(outputs, targets):
        assert not any(reference() is not None for reference in alive)  # of the models before, and of earlier steps
        alive.append(weakref.ref(outputs))
        return cross_entropy(outputs, targets)

    fit_alone(classifiers(), SGD, CONFIGS, points(), loss_fn, 2, seeds=SEEDS)
    assert len(alive) == 8 * M
