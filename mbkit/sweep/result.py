"""What a sweep leaves behind: a table of its trials, in the order of their scores, each as a module of its own."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..batch.whole_state import load_whole
from ..common.tables import Tables
from .configs import Parts
from .folder import batch_file, read_batch
from .worker import Task, build_batch, own_process

_ROWS_SHOWN = 20


@dataclass
class Trial:
    """One configuration and what became of it.

    Attributes:
        number: its place in the sweep. config, seed: as it was trained.
        scores, losses: at each rung that it came to: the score, and the mean training loss of the epoch before.
        rungs: the epochs at these rungs.
    """

    number: int
    config: dict[str, Any]
    seed: int
    scores: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rungs: list[int] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)  # at each rung: its batch, and its row there

    def note(self, epochs: int, score: float, loss: float, place: tuple[int, int]) -> None:
        """Add what a rung has shown."""
        self.places.append(place)
        self.rungs.append(epochs)
        self.scores.append(score)
        self.losses.append(loss)

    @property
    def best_rung(self) -> int:
        """The rung at which its score was highest."""
        return ordered(self.scores)[0]

    @property
    def score(self) -> float:
        """Its highest score."""
        return self.scores[self.best_rung]

    @property
    def epochs(self) -> int:
        """How long it was trained."""
        return self.rungs[-1]


def ordered(scores: Sequence[float]) -> list[int]:
    """Return places from the highest score to the lowest; NaN is lowest, and of equals the first comes first.

    Example:
        >>> ordered([0.5, math.nan, 0.9, 0.5])
        [2, 0, 3, 1]
    """
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i], i))


def group_scores(trials: Iterable[Trial], labels: Sequence[Hashable]) -> dict[Hashable, list[float]]:
    """Return each label's mean scores, rung by rung; trials of one label have come equally far.

    Args:
        trials: some of a sweep's. labels: of all its trials.
    """
    groups: dict[Hashable, list[list[float]]] = {}
    for trial in trials:
        groups.setdefault(labels[trial.number], []).append(trial.scores)
    return {label: [sum(each) / len(each) for each in zip(*scores, strict=True)] for label, scores in groups.items()}


class SweepResult(Tables):
    """The trials of a sweep; it prints itself as a table, the best first.

    A trial's score is the highest of those at its rungs, and `load` gives the model that had it.

    Attributes:
        trials: in the order of the configurations.
        folder: where the files are.
        numbers: the trials' numbers in the study, after `optuna_sweep`. fresh: whether they were asked in this process.
    """

    numbers: list[int]
    fresh: bool

    def __init__(self, trials: list[Trial], task: Task, parts: Sequence[Parts], labels: Sequence[Hashable]) -> None:
        self.trials, self.folder = trials, task.folder
        self._task, self._parts, self._labels = task, parts, labels

    def __len__(self) -> int:
        return len(self.trials)

    @property
    def ranked(self) -> list[Trial]:
        """The trials, the best first."""
        return [self.trials[i] for i in ordered([trial.score for trial in self.trials])]

    @property
    def best(self) -> Trial:
        """The trial with the highest score; of groups, the best trial of the best group."""
        means = self.group_scores()
        label = list(means)[ordered(list(means.values()))[0]]
        return next(trial for trial in self.ranked if self._labels[trial.number] == label)

    def group_scores(self) -> dict[Hashable, float]:
        """Return each group's score by its label: the highest mean of its trials at one rung."""
        return {label: own[ordered(own)[0]] for label, own in group_scores(self.trials, self._labels).items()}

    def load(self, trial: Trial | int, rung: int | None = None) -> nn.Module:
        """Return a trial's model as a stand-alone module.

        Args:
            trial: a Trial or its number.
            rung: its place in `rungs`; by default the one at which the score was highest.

        Raises:
            IndexError: no such trial, or one that did not come to that rung.
        """
        number = trial.number if isinstance(trial, Trial) else trial
        if not 0 <= number < len(self.trials):
            raise IndexError(f"Expected a trial from 0 to {len(self.trials) - 1}, got {number}.")
        own = self.trials[number]
        rung, last = own.best_rung if rung is None else rung, len(own.rungs) - 1
        if not 0 <= rung <= last:
            raise IndexError(f"Expected a rung from 0 to {last}, as far as trial {number} came, got {rung}.")
        batch_number, row = own.places[rung]
        saved = read_batch(batch_file(self.folder, rung, batch_number), "batch of a sweep")
        with own_process(self._task):
            batch = build_batch(self._task, [self._parts[number]] * len(saved["trials"]), saved["batch"]["seeds"])
            load_whole(batch, saved["batch"])
            return batch[row]

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each trial: its configuration, seed, epochs, score and loss."""
        import pandas

        return pandas.DataFrame(self._records()).set_index("trial")

    def plot(self) -> Any:
        """Draw parallel coordinates: an axis for each setting and for the score, a line for each trial.

        Returns:
            A `Picture`, which shows itself in a notebook and has `savefig(path)`.
        """
        from ..figures.sweeps import parallel_coordinates

        return parallel_coordinates(self)

    @property
    def names(self) -> list[str]:
        """The settings that the configurations name, in their order."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.config))

    def _records(self) -> list[dict[str, Any]]:
        means = self.group_scores() if len(set(self._labels)) < len(self.trials) else None
        records = []
        for trial in self.ranked:
            record = {"trial": trial.number, **{name: trial.config.get(name) for name in self.names}}
            record |= {} if "seed" in record else {"seed": trial.seed}
            record |= {"epochs": trial.epochs, "score": trial.score, "loss": trial.losses[trial.best_rung]}
            records.append(record | ({} if means is None else {"group score": means[self._labels[trial.number]]}))
        return records

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        records = self._records()
        rungs = self._task.rungs
        came = [sum(len(trial.rungs) > rung for trial in self.trials) for rung in range(len(rungs))]
        course = ", ".join(f"{count} after {epochs}" for epochs, count in zip(rungs, came, strict=True))
        title = f"Sweep: {len(self)} trials; epochs: {course}"
        rows = [list(records[0]), *([_word(value) for value in r.values()] for r in records[:_ROWS_SHOWN])]
        return [(title, rows + [["..."] * len(rows[0])] * (len(records) > _ROWS_SHOWN))]


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
