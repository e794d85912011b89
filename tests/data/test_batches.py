"""Batches: pairs stay pairs, and the order is a function of seed and epoch alone."""

import copy

import numpy as np
import pytest
import torch
from oracle import assert_same_parameters, close, train_alone
from torch import nn
from torch.nn.functional import cross_entropy

from mbkit import ModelBatch, OptimizerFactory, fit, fit_alone
from mbkit.data.batches import Batches


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    x = torch.arange(100)

    def epochs(batches, numbers):
        result = []
        for number in numbers:
            batches.set_epoch(number)
            result.append(torch.cat([y for _, y in batches]).tolist())
        return result

    def make(seed):
        return Batches(x, x, 7, seed=seed)

    forward = epochs(make(3), range(5))
    assert epochs(make(3), [4, 3, 2, 1, 0]) == forward[::-1]
    batches = make(3)
    assert [torch.cat([y for _, y in batches]).tolist() for _ in range(5)] == forward  # as a DataLoader goes on
    next(iter(batches))  # an epoch left early counts
    assert torch.cat([y for _, y in batches]).tolist() == batches.order(6).tolist()
    several = forward + epochs(make(4), range(5)) + epochs(make(2**32 + 3), range(5))
    assert len({tuple(order) for order in several}) == 15  # seed 3 in epoch 1 is not seed 4 in epoch 0
    assert all(sorted(order) == list(range(100)) for order in several)


def test_walks_do_not_share_a_place():
    batches = Batches(torch.arange(6), torch.arange(6), 2)
    first, second = iter(batches), iter(batches)
    pairs = [(a[1].tolist(), b[1].tolist()) for a, b in zip(second, first, strict=True)]
    assert [i for a, _ in pairs for i in a] == batches.order(1).tolist()
    assert [i for _, b in pairs for i in b] == batches.order(0).tolist()


def test_no_global_generator_is_touched():
    torch.manual_seed(5)
    np.random.seed(5)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    walk = Batches(torch.arange(100), torch.arange(100), 10, seed=1)
    first = [y.tolist() for _, y in walk]
    assert torch.get_rng_state().equal(before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)
    torch.rand(3)
    walk.set_epoch(0)
    assert [y.tolist() for _, y in walk] == first


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_batches_pair_inputs_with_targets(drop_last, sizes):
    inputs = torch.arange(30.0).reshape(10, 3)
    batches = Batches(inputs, inputs[:, 0], 4, drop_last=drop_last, transform=lambda x: x * 2)
    seen = list(batches)
    assert [len(x) for x, _ in seen] == sizes
    assert len(batches) == len(sizes)
    for x, y in seen:
        assert x[:, 0].equal(2 * y)
        assert x.shape[1:] == (3,)


def test_editing_a_batch_in_place_leaves_the_data_alone():
    inputs = torch.arange(10.0)
    for shuffle in (True, False):
        for x, y in Batches(inputs, inputs, 5, shuffle=shuffle):
            x.zero_()
            y.zero_()
    assert inputs.tolist() == list(range(10))


X = torch.zeros(4, 2)
SUBSETS = torch.arange(4).repeat(3, 1)
BAD_BATCHES = {
    "lengths": ({"inputs": X, "targets": X[:3]}, r"got shapes \[4, 2\] and \[3, 2\]"),
    "no dimension": ({"inputs": X, "targets": X[0, 0]}, "one entry per example"),
    "empty": ({"inputs": X[:0], "targets": X[:0]}, "one entry per example"),
    "devices": ({"inputs": X, "targets": X.to("meta")}, "cpu and meta"),
    "size 0": ({"inputs": X, "targets": X, "batch_size": 0}, "at least 1 as batch_size, got 0"),
    "size 1.5": ({"inputs": X, "targets": X, "batch_size": 1.5}, "got 1.5"),
    "size True": ({"inputs": X, "targets": X, "batch_size": True}, "got True"),
    "nothing left": (
        {"inputs": X, "targets": X, "batch_size": 5, "drop_last": True},
        "at most 4 with drop_last, got 5",
    ),
    "seed": ({"inputs": X, "targets": X, "seed": -1}, "got -1"),
    "seed of no number": ({"inputs": X, "targets": X, "seed": 1.5}, "got 1.5"),
    "no seeds": ({"inputs": X, "targets": X, "seed": []}, "1 seeds .*, got 0"),
    "seeds": ({"inputs": X, "targets": X, "seed": [1, 2], "subsets": SUBSETS}, "3 seeds .*, got 2"),
    "ragged": ({"inputs": X, "targets": X, "subsets": [SUBSETS[0], SUBSETS[0][:2]]}, "got list: .* one length"),
    "a mask": ({"inputs": X, "targets": X, "subsets": SUBSETS > 0}, r"got torch.bool \[3, 4\]"),
    "one subset": ({"inputs": X, "targets": X, "subsets": SUBSETS[0]}, r"got torch.int64 \[4\]"),
    "too large": ({"inputs": X, "targets": X, "subsets": SUBSETS + 1}, "from 0 to 3, got 1 to 4"),
    "negative": ({"inputs": X, "targets": X, "subsets": SUBSETS - 1}, "from 0 to 3, got -1 to 2"),
    "empty subsets": ({"inputs": X, "targets": X, "subsets": SUBSETS[:, :0]}, r"got the shape \[3, 0\]"),
    "nothing left of a subset": (
        {"inputs": X, "targets": X, "batch_size": 3, "drop_last": True, "subsets": SUBSETS[:, :2]},
        "at most 2 with drop_last, got 3",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_batches_are_refused(arguments, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Batches(**{"batch_size": 2, **arguments})


def test_a_bad_epoch_is_refused():
    with pytest.raises(ValueError, match="epoch, got -1"):
        Batches(X, X, 2).set_epoch(-1)


# ------------------------------------------------------------------ batches of each model's own

M, N, EPOCHS = 3, 22, 2


def own_pairs(inputs, targets, subset, seed, batch_size, epochs=EPOCHS):
    """What a lone model sees, put together by hand."""
    for epoch in range(epochs):
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
        for places in np.split(
            subset.numpy()[generator.permutation(len(subset))], range(batch_size, len(subset), batch_size)
        ):
            yield inputs[places], targets[places]


@pytest.mark.parametrize(
    ("seeds", "subsets"),
    [
        ([7, 8, 9], None),
        (5, torch.randint(N, (M, 12), generator=torch.Generator().manual_seed(0))),
        ([3, 1, 2], torch.randint(N, (M, 12), generator=torch.Generator().manual_seed(1))),
    ],
    ids=["orders", "bags", "both"],
)
def test_models_with_data_of_their_own_train_as_alone(seeds, subsets):
    torch.set_default_dtype(torch.float64)
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)) for _ in range(M)]
    raw, y = torch.randint(256, (N, 4), dtype=torch.uint8), torch.randint(3, (N,))
    x, mean = raw.double() / 255 - 0.5, torch.tensor([127.5] * 4)
    rates = [0.01, 0.02, 0.03]

    expected, losses, adam = copy.deepcopy(models), [], {"optimizer_cls": torch.optim.Adam, "loss_fn": cross_entropy}
    for m, model in enumerate(expected):
        subset = torch.arange(N) if subsets is None else subsets[m]
        pairs = list(own_pairs(x, y, subset, seeds if isinstance(seeds, int) else seeds[m], 5))
        losses.append(train_alone([model], pairs, seeds=[m], configs={"lr": rates[m]}, **adam))

    data = Batches(raw, y, 5, seed=seeds, subsets=subsets, transform=lambda x: x.double().sub_(mean).div_(255))
    batch = ModelBatch(models, shared_input=False, seeds=range(M))
    optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=rates)
    history = fit(batch, optimizer, data, cross_entropy, EPOCHS, progress=False)
    configs = [{"lr": rate} for rate in rates]
    rest = {"seeds": range(M), "shared_input": False, "progress": False}
    alone = fit_alone(models, torch.optim.Adam, configs, data, cross_entropy, EPOCHS, **rest)
    for loss in (history.loss, alone.loss):
        close(loss, torch.cat(losses, 1))
    assert_same_parameters(batch.models, expected)
    assert_same_parameters(models, expected)


def test_the_orders_of_many_models_come_by_the_epoch_and_batches_by_one_gather():
    """Batch after batch there is no work for each model: as many operators for 3 models as for 300."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    counts, x = [], torch.arange(20.0)
    for num_models in (3, 300):
        walk, called = iter(Batches(x, x, 4, seed=range(num_models))), []
        next(walk)
        called.clear()
        with Count():
            inputs, targets = next(walk)
        assert inputs.shape == (num_models, 4)
        assert torch.equal(inputs, targets)
        counts.append(called)
    assert counts[0] == counts[1]
    assert counts[0].count("index_select") == 2  # the inputs and the targets


def test_a_transform_sees_own_batches_as_one():
    seen = []
    batches = Batches(
        torch.zeros(8, 3, 2), torch.zeros(8), 4, seed=[0, 1], transform=lambda x: (seen.append(x.shape), x[:, 0])[1]
    )
    assert [x.shape for x, _ in batches] == [(2, 4, 2)] * 2
    assert seen == [(8, 3, 2)] * 2


@pytest.mark.parametrize("subsets", [None, torch.tensor([[3, 1, 1], [0, 2, 5]])])
def test_unshuffled_batches_keep_the_order(subsets):
    batches = Batches(torch.arange(10), torch.arange(10), 2, shuffle=False, subsets=subsets)
    expected = torch.arange(10) if subsets is None else subsets
    assert torch.cat([y for _, y in batches], -1).equal(expected)
    assert batches.order(4).equal(expected)
    assert len(batches) == (5 if subsets is None else 2)
