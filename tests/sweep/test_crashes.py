"""Whatever ends a sweep, the same call again ends in the digest of the undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_cases import digest, killed, schedule_of_kills, standard


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """Return the digest of a sweep that nobody disturbed, and its number of events."""
    here, forked = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("forked")
    standard(here)  # first, so that forks find everything imported
    ended, events = killed(lambda: standard(forked), -1)
    assert ended == 0
    assert digest(forked) == digest(here)
    return digest(here), events


def end_in_the_same_bits(folder: Path, kills: list[tuple[int, bool]], undisturbed: tuple[str, int]) -> None:
    for after, before in kills:
        ended, _ = killed(lambda: standard(folder), after, before)
        assert ended in (None, 0)
    result = standard(folder)
    assert digest(folder) == undisturbed[0]
    assert not list(folder.rglob("*.part*"))
    assert not list(folder.rglob("*.state.*"))
    assert [trial.epochs for trial in result.trials].count(4) == 2


def test_a_driver_that_is_killed_five_times(tmp_path: Path, undisturbed: tuple[str, int]) -> None:
    kills = schedule_of_kills(0, 5, undisturbed[1] // 3)
    end_in_the_same_bits(tmp_path, kills, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_a_driver_that_is_killed_at_thirty_moments(seed: int, tmp_path: Path, undisturbed: tuple[str, int]) -> None:
    end_in_the_same_bits(tmp_path, schedule_of_kills(100 + seed, 1, undisturbed[1]), undisturbed)
