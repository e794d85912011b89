"""One value or one a model, seeds, and guesses at what was meant."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mbkit.common.checks import check_seeds, did_you_mean, per_model


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, [0.1] * 3),
        (None, [None] * 3),
        ("fast", ["fast"] * 3),
        ((0.9, 0.999), [(0.9, 0.999)] * 3),  # a tuple is one value: betas
        ([1, 2, 3], [1, 2, 3]),
        ([(0.9, 0.99), (0.8, 0.99), (0.7, 0.99)], [(0.9, 0.99), (0.8, 0.99), (0.7, 0.99)]),
        (range(3), [0, 1, 2]),
        (np.array([0.5, 1.0, 2.0]), [0.5, 1.0, 2.0]),
        (torch.tensor([1, 2, 3]), [1, 2, 3]),
        (torch.tensor(0.5), [0.5] * 3),
        (np.float32(0.5), [0.5] * 3),
        (True, [True] * 3),
    ],
)
def test_one_value_or_one_a_model(value: object, expected: list) -> None:
    got = per_model(value, 3, "rates")
    assert got == expected
    assert [type(v) for v in got] == [type(v) for v in expected]


def test_the_list_is_a_new_one() -> None:
    given = [1, 2]
    per_model(given, 2, "rates").append(3)
    assert given == [1, 2]


@pytest.mark.parametrize("value", [[], [1], [1, 2, 3, 4], range(2), torch.zeros(5), np.zeros(1)])
def test_another_number_of_values_than_models(value: object) -> None:
    said = (
        rf"Expected 3 learning rates \(one per model\), got {len(value)}: pass one value for all models or a list of 3"
    )
    with pytest.raises(ValueError, match=said):
        per_model(value, 3, "learning rates")


@pytest.mark.parametrize(
    "seeds",
    [
        [0, 5, 2**63 - 1],
        (0, 5, 2**63 - 1),
        np.array([0, 5, 2**63 - 1]),
        torch.tensor([0, 5, 2**63 - 1]),
        [np.int64(0), torch.tensor(5), 2**63 - 1],
        iter([0, 5, 2**63 - 1]),
    ],
)
def test_seeds_in_any_form(seeds: object) -> None:
    got = check_seeds(seeds, 3)
    assert got == [0, 5, 2**63 - 1]
    assert all(type(seed) is int for seed in got)
    for seed in got:
        torch.manual_seed(seed)  # torch takes each, too


def test_absent_seeds_come_from_the_default_generator_and_differ() -> None:
    torch.manual_seed(1)
    drawn = check_seeds(None, 1000)
    torch.manual_seed(1)
    assert check_seeds(None, 1000) == drawn
    assert len(set(drawn)) == 1000
    assert all(type(seed) is int and 0 <= seed < 2**63 for seed in drawn)


def test_absent_seeds_are_drawn_on_the_cpu() -> None:
    torch.manual_seed(1)
    expected = check_seeds(None, 3)
    torch.manual_seed(1)
    with torch.device("meta"):  # as under torch.set_default_device("cuda")
        assert check_seeds(None, 3) == expected


@pytest.mark.parametrize(
    ("seeds", "kind", "text"),
    [
        ([1, 2], ValueError, r"Expected 3 seeds \(one per model\), got 2: pass a list of 3, or none at all"),
        (range(4), ValueError, r"Expected 3 seeds \(one per model\), got 4"),
        ([], ValueError, r"Expected 3 seeds \(one per model\), got 0"),
        (7, TypeError, r"Expected 3 seeds \(one per model\), got 7: pass a list of 3"),
        (torch.tensor(7), TypeError, r"Expected 3 seeds \(one per model\), got 7"),
        ("123", TypeError, r"Expected 3 seeds \(one per model\), got '123'"),
        ([1, 2, -3], ValueError, "Expected at least 0 as seed, got -3: pass 0 or more"),
        ([1, 2, 2**63], ValueError, r"Expected seeds from 0 to 2\*\*63 - 1, got 9223372036854775808"),
        ([1, 2, 3.0], TypeError, r"Expected a whole number as seed, got 3\.0: pass 0 or more"),
        ([1, 2, True], TypeError, "Expected a whole number as seed, got True"),
        ([1, 2, "3"], TypeError, "Expected a whole number as seed, got '3'"),
        ([1, 2, None], TypeError, "Expected a whole number as seed, got None"),
    ],
)
def test_seeds_that_are_none(seeds: object, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        check_seeds(seeds, 3)


def test_did_you_mean() -> None:
    options = ["weight_decay", "lr", "momentum"]
    assert did_you_mean("weight_dacay", options) == " Did you mean 'weight_decay'?"
    assert did_you_mean("momentun", iter(options)) == " Did you mean 'momentum'?"
    assert did_you_mean("xyz", options) == " Choose from: lr, momentum, weight_decay."
