"""Optuna asks, a whole batch at once; mbkit trains and ranks it; Optuna is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import whole_number
from ..common.files import write_bytes
from .configs import is_range
from .engine import sweep
from .folder import locked, plain_json
from .result import SweepResult


def optuna_sweep(
    study: Any,
    space: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]],
    n_trials: int,
    build: Callable[..., nn.Module],
    optimizer_cls: type[torch.optim.Optimizer],
    data: Any,
    loss_fn: Callable[..., Tensor],
    *,
    folder: str | Path,
    trials_per_round: int = 64,
    sampler: Callable[[int], Any] | None = None,
    **settings: Any,
) -> list[SweepResult]:
    """Let an Optuna study choose the configurations, round by round, and train each round as one sweep.

    A round's trials are asked all at once, written down, trained and halved as in `sweep`, and told: those that came to
    the last rung as COMPLETE, the others as PRUNED by the ranking of the whole round (a pruner is not asked), NaN as
    FAIL. A study that minimizes is told minus the score.

    The same call again goes on after anything: no trial is told twice, and those that were asked but not written down
    are told FAIL. So let no one else use the study meanwhile.

    Args:
        study: with any sampler and storage; JournalStorage is quick, sqlite takes seconds to ask 64 trials.
        space: as for `sample`, or a function of an Optuna trial that returns a configuration.
        n_trials: how many in all, in rounds of `trials_per_round`.
        build, optimizer_cls, data, loss_fn: as for `sweep`.
        folder: where everything is kept.
        sampler: makes the sampler for a round from its number: `lambda k: TPESampler(seed=k)`. One seed for all rounds
            would ask for the same configurations again after a restart.
        **settings: of `sweep`: valid, rungs and so on.

    Returns:
        A SweepResult per round; its `numbers` are the trials' numbers in the study.

    Raises:
        ValueError: a study of several objectives, or another study's folder; and what `sweep` raises.
    """
    from optuna.trial import TrialState

    for name, number in (("n_trials", n_trials), ("trials_per_round", trials_per_round)):
        whole_number(number, name)
    if len(study.directions) != 1:
        raise ValueError(f"Expected a study of one objective, got {len(study.directions)}: rank by one score.")
    home = Path(folder)
    with locked(home):
        begun = _kept(home / "study.json", lambda: {"study": study.study_name, "first": len(study.get_trials(False))})
        if begun["study"] != study.study_name:
            raise ValueError(f"Expected study {begun['study']!r}, whose folder {home} is, got {study.study_name!r}.")
        claimed = {n for file in home.glob("round-*.json") for n in json.loads(file.read_bytes())["numbers"]}
        for trial in study.get_trials(False, (TrialState.RUNNING,)):
            if trial.number >= begun["first"] and trial.number not in claimed:  # asked, and then we were killed
                study.tell(trial.number, state=TrialState.FAIL)
        results = []
        for k, done in enumerate(range(0, n_trials, trials_per_round)):

            def ask(k: int = k, count: int = min(trials_per_round, n_trials - done)) -> dict[str, Any]:
                if sampler is not None:
                    study.sampler = sampler(k)
                elif k and not results[-1].fresh:  # a new process, and a sampler that may begin anew
                    study.sampler.reseed_rng()
                asked = [_ask(study, space) for _ in range(count)]
                return {"numbers": [number for number, _ in asked], "configs": [config for _, config in asked]}

            file = home / f"round-{k:05}.json"
            fresh = not file.exists()
            claim = _kept(file, ask)
            seeds = settings.get("seeds", range(n_trials))[done : done + len(claim["numbers"])]
            given = {**settings, "seeds": seeds, "folder": home / f"round-{k:05}"}
            result = sweep(build, optimizer_cls, claim["configs"], data, loss_fn, **given)
            result.numbers, result.fresh = claim["numbers"], fresh
            _tell(study, result)
            results.append(result)
    return results


def _kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds; what is to be in it is made first, if need be, and comes as JSON gives it back."""
    if not file.exists():
        write_bytes(file, json.dumps(plain_json(make())).encode())
    return json.loads(file.read_bytes())


def _ask(study: Any, space: Any) -> tuple[int, dict[str, Any]]:
    trial = study.ask()
    if callable(space):
        return trial.number, dict(space(trial))
    config = {}
    for name, own in space.items():
        if not is_range(name, own):
            config[name] = trial.suggest_categorical(name, own)
            continue
        suggest = trial.suggest_int if all(isinstance(value, int) for value in own[:2]) else trial.suggest_float
        config[name] = suggest(name, *own[:2], log=len(own) == 3)
    return trial.number, config


def _tell(study: Any, result: SweepResult) -> None:
    """Report all scores of a round, and then tell how each trial ended; what has been told already stays."""
    from optuna.trial import Trial, TrialState

    known = study.get_trials(False)
    sign = 1 if study.direction.name == "MAXIMIZE" else -1
    last = max(trial.epochs for trial in result.trials)
    running = [(known[n], own) for n, own in zip(result.numbers, result.trials, strict=True)]
    running = [(frozen, own) for frozen, own in running if not frozen.state.is_finished()]
    for frozen, own in running:
        trial = Trial(study, frozen._trial_id)  # the only way to report for a trial that another process asked
        for epochs, score in zip(own.rungs, own.scores, strict=True):
            if epochs not in frozen.intermediate_values:
                trial.report(sign * score, epochs)
    for frozen, own in running:
        if math.isnan(own.scores[-1]):
            study.tell(frozen.number, state=TrialState.FAIL)
        elif own.epochs < last:
            study.tell(frozen.number, state=TrialState.PRUNED)
        else:
            study.tell(frozen.number, sign * own.scores[-1])
