"""Optuna asks, mbkit trains and ranks whole rounds: nothing is told or asked twice, nothing is left running."""

from __future__ import annotations

import json
import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_cases import Net, data, killed, valid
from torch import nn

import mbkit

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = {"lr": (1e-3, 1.0, "log"), "dropout": (0.0, 0.5), "amsgrad": [True, False]}


def study_in(folder: Path, storage: str = "journal", direction: str = "maximize") -> Any:
    if storage == "sqlite":
        where: Any = f"sqlite:///{folder}/study.db"
    else:
        file = f"{folder}/study.journal"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 1 s is short, and 30 s until a killed process's lock is free are long
            lock = optuna.storages.journal.JournalFileOpenLock(file, grace_period=1)
        where = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file, lock))
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(storage=where, study_name="s", load_if_exists=True, direction=direction, sampler=sampler)


def search(folder: Path, study: Any, **changes: Any) -> list[Any]:
    settings = {
        "folder": folder / "sweep", "trials_per_round": 6, "valid": valid, "score": "loss", "rungs": (1, 2),
        "reduction_factor": 3, "sampler": lambda k: optuna.samplers.TPESampler(seed=k, n_startup_trials=4),
        "models_per_batch": 4, "save_every": 0.0, "progress": False,
    }  # fmt: skip
    settings |= changes
    given = (partial(Net, 4), torch.optim.Adam, data, nn.functional.cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return mbkit.optuna_sweep(study, settings.pop("space", SPACE), settings.pop("n_trials", 15), *given, **settings)


def facts(study: Any) -> list[Any]:
    return [(t.number, t.state.name, t.params, t.value, t.intermediate_values) for t in study.get_trials(False)]


def check_told(study: Any, results: list[Any], sign: int) -> None:
    """Each trial was told once what its own training showed."""
    known = {t.number: t for t in study.get_trials(False)}
    numbers = [n for result in results for n in result.numbers]
    assert len(numbers) == len(set(numbers)) == 15
    assert [len(result.numbers) for result in results] == [6, 6, 3]
    for result in results:
        for number, trial in zip(result.numbers, result.trials, strict=True):
            told = known[number]
            assert told.state.name == ("COMPLETE" if trial.epochs == 2 else "PRUNED")
            assert told.intermediate_values == dict(zip(trial.rungs, [sign * s for s in trial.scores], strict=True))
            assert told.value == sign * trial.scores[-1]
            assert told.params == trial.config
    assert not [t for t in known.values() if t.state.name == "RUNNING"]


@pytest.mark.parametrize(
    ("storage", "direction"), [("journal", "minimize"), pytest.param("sqlite", "maximize", marks=pytest.mark.slow)]
)
def test_rounds_are_asked_trained_ranked_and_told(storage: str, direction: str, tmp_path: Path) -> None:
    study = study_in(tmp_path, storage, direction)
    results = search(tmp_path, study)
    check_told(study, results, 1 if direction == "maximize" else -1)
    before = facts(study)
    again = search(tmp_path, study_in(tmp_path, storage, direction))
    assert facts(study_in(tmp_path, storage, direction)) == before
    assert list(map(repr, again)) == list(map(repr, results))
    assert [trial.seed for result in results for trial in result.trials] == list(range(15))


def test_a_search_that_is_killed_again_and_again_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    whole, folder, own = tmp_path / "whole", tmp_path / "killed", random.Random(1)
    whole.mkdir()
    folder.mkdir()
    ended, events = killed(lambda: search(whole, study_in(whole)), -1)
    assert ended == 0
    for _ in range(3):
        killed(lambda: search(folder, study_in(folder)), own.randint(1, events // 3), own.random() < 0.5)
    study = study_in(folder)
    results = search(folder, study)
    check_told(study, results, 1)
    assert len({json.dumps(trial.config) for result in results for trial in result.trials}) == 15
    assert len(results) == len(search(whole, study_in(whole)))


def test_trials_that_were_asked_but_not_written_down_fail_and_older_ones_stay(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    older = study.ask()
    search(tmp_path, study, n_trials=6)
    orphan = study.ask()
    search(tmp_path, study, n_trials=12)
    states = {t.number: t.state.name for t in study.get_trials(False)}
    assert states[older.number] == "RUNNING"
    assert states[orphan.number] == "FAIL"
    assert sorted(states.values()).count("COMPLETE") == 4


def test_a_space_may_be_a_function_and_any_sampler_goes(tmp_path: Path) -> None:
    def space(trial: Any) -> dict[str, Any]:
        kind = trial.suggest_categorical("kind", ["slow", "fast"])
        return {"lr": trial.suggest_float(f"lr_{kind}", 0.01, 0.1), "betas": (0.8, 0.9)}

    study = study_in(tmp_path)
    (result,) = search(tmp_path, study, space=space, n_trials=5, sampler=lambda k: optuna.samplers.QMCSampler(seed=k))
    assert all(0.01 <= trial.config["lr"] <= 0.1 for trial in result.trials)


def test_another_study_and_several_objectives_are_refused(tmp_path: Path) -> None:
    search(tmp_path, study_in(tmp_path), n_trials=2)
    with pytest.raises(ValueError, match="Expected study 's', whose folder"):
        search(tmp_path, optuna.create_study(study_name="other"), n_trials=2)
    with pytest.raises(ValueError, match="one objective, got 2"):
        search(tmp_path, optuna.create_study(directions=["maximize", "minimize"]))
