"""Batches: pairs stay pairs, and the order is a function of seed and epoch alone."""

import numpy as np
import pytest
import torch

from mbkit.batches import Batches


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


def test_unshuffled_batches_keep_the_order():
    batches = Batches(torch.arange(10), torch.arange(10), 3, shuffle=False)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(10))


X = torch.zeros(4, 2)
BAD_BATCHES = {
    "lengths": ({"inputs": X, "targets": X[:3]}, r"got shapes \[4, 2\] and \[3, 2\]"),
    "no dimension": ({"inputs": X, "targets": X[0, 0]}, "one entry per example"),
    "empty": ({"inputs": X[:0], "targets": X[:0]}, "one entry per example"),
    "devices": ({"inputs": X, "targets": X.to("meta")}, "cpu and meta"),
    "size 0": ({"inputs": X, "targets": X, "batch_size": 0}, "at least 1, got 0"),
    "size 1.5": ({"inputs": X, "targets": X, "batch_size": 1.5}, "got 1.5"),
    "size True": ({"inputs": X, "targets": X, "batch_size": True}, "got True"),
    "nothing left": (
        {"inputs": X, "targets": X, "batch_size": 5, "drop_last": True},
        "at most 4 with drop_last, got 5",
    ),
    "seed": ({"inputs": X, "targets": X, "seed": -1}, "seed, got -1"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_batches_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Batches(**{"batch_size": 2, **arguments})


def test_a_bad_epoch_is_refused():
    with pytest.raises(ValueError, match="epoch, got -1"):
        Batches(X, X, 2).set_epoch(-1)
