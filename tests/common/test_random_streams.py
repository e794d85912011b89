"""The global generators of torch, Python and NumPy: whether they moved, and whose turn it is to draw from them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from oracle import next_draws, seed_all

from mbkit.common.random_streams import OwnDraws, generator_marks, in_turn, moved_generators


@pytest.fixture(params=["as it is", "replaced"])
def _numpy(request: pytest.FixtureRequest) -> Iterator[None]:
    before = np.random.get_bit_generator()
    if request.param == "replaced":
        np.random.set_bit_generator(np.random.MT19937(7))
    yield
    np.random.set_bit_generator(before)


DRAWS = {
    "random": [random.random, lambda: random.shuffle([1, 2]), lambda: random.gauss(0, 1), lambda: random.seed(5)],
    "numpy.random": [np.random.rand, np.random.randn, lambda: np.random.permutation(3), lambda: np.random.seed(5)],
}


@pytest.mark.usefixtures("_numpy")
def test_each_draw_is_noticed_and_nothing_else() -> None:
    for name, draws in DRAWS.items():
        for draw in draws * 200:  # past the end of the 624 words, too
            before = generator_marks()
            assert moved_generators(before) == []
            draw()
            assert moved_generators(before) == [name]
            seeded = draw is draws[-1]
            if seeded:  # to seed again with the same number leaves it where it is
                before = generator_marks()
                draw()
                assert moved_generators(before) == []


@pytest.mark.usefixtures("_numpy")
def test_own_draws_are_those_after_seeding_and_leave_the_global_ones_alone() -> None:
    seed_all(3)
    expected = [next_draws() for _ in range(8)]
    seed_all(4)
    others = [next_draws() for _ in range(8)]
    own = OwnDraws(3)
    seed_all(4)
    for mine, theirs in zip(expected, others, strict=True):
        with own.current():
            assert next_draws() == mine
        assert next_draws() == theirs
    assert own.drew


def test_a_model_that_draws_late_is_noticed() -> None:
    own = OwnDraws(3)
    for _ in range(9):
        with own.current():
            pass
    assert not own.drew
    with own.current():
        random.random()
    assert own.drew


def test_all_in_turn_draw_the_same_numbers() -> None:
    seed_all(3)
    drawn = {next_draws() for _ in in_turn(range(3))}
    after = next_draws()
    seed_all(3)
    assert drawn == {next_draws()}
    assert after == next_draws()
    assert torch.rand(()).item() != after[0]
