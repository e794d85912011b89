"""The benchmark suite: every way to train M models, case by case, in turns, as ratios of medians."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..common.machine import describe_machine
from ..common.progress import Progress
from ..common.tables import Tables
from .baselines import BASELINES, OWN
from .cases import CASES, Case
from .result import Timing, save_json
from .timing import Elsewhere, Turns

__all__ = ["CASES", "Case", "SuiteResult", "run_suite"]

ROUNDS = 5
SECONDS = 0.2  # that a side's turn lasts, about, unless one step is longer


@dataclass(eq=False, repr=False)
class SuiteResult(Tables):
    """What the suite measured; it prints as a table.

    Attributes:
        rows: a dict a case: "network", "num_models", "batch_size", "parameters", "how" (what fit chose), and "seconds":
            a side's name -> raw times a model and step.
        machine: device, threads and versions.
    """

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def timing(self, row: dict[str, Any], side: str) -> Timing | None:
        """Return a side's median and quartiles, in seconds a model and step; None where it was not run."""
        seconds = row["seconds"].get(side)
        return None if seconds is None else Timing.of(torch.tensor(seconds, dtype=torch.float64))

    def ratio(self, row: dict[str, Any], side: str, over: str = "sequential") -> float | None:
        """Return how many times as fast a side is as another: the ratio of their medians."""
        mine, other = self.timing(row, side), self.timing(row, over)
        return None if mine is None or other is None else other.median / mine.median

    def table(self) -> list[list[str]]:
        """Return the table's rows of text; the first is the header."""
        sides = [side for side in BASELINES if any(side in row["seconds"] for row in self.rows)]
        lines = [["network", "M", "batch", "sequential, ms (quartiles)", *sides[1:], "fit chose"]]
        for row in self.rows:
            ratios = [self.ratio(row, side) for side in sides[1:]]
            times = ["-" if ratio is None else f"{ratio:.2f} x" for ratio in ratios]
            sizes = [row["network"], str(row["num_models"]), str(row["batch_size"])]
            lines.append([*sizes, str(self.timing(row, "sequential")), *times, row["how"]])
        return lines

    def growth(self) -> dict[str, dict[int, Any]]:
        """Return how cost grows, for `plots.scaling`: what grows -> its value -> the times `alone` and `batched`."""
        found: dict[str, dict[int, Any]] = {}
        for row in self.rows:
            timed = SimpleNamespace(alone=self.timing(row, "sequential"), batched=self.timing(row, "mbkit"))
            network, m, b = row["network"], row["num_models"], row["batch_size"]
            if (network, b) in (("MLP", 32), ("LeNet5", 128)):
                found.setdefault(f"models M, {network}, B = {b}", {})[m] = timed
            if network == "LeNet5" and m == 16:
                found.setdefault("batch B, LeNet5, M = 16", {})[b] = timed
            if m == 8 or (network, m, b) in (("MLP", 16, 32), ("LeNet5", 16, 32)):
                found.setdefault("parameters, M = 8 or 16, B = 32", {})[row["parameters"]] = timed
        return {what: dict(sorted(values.items())) for what, values in found.items() if len(values) > 1}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists with the raw runs, fit for JSON."""
        return {"kind": "suite", "machine": self.machine, "rows": self.rows}

    def save(self, path: str | Path) -> None:
        """Write everything as JSON; folders are made."""
        save_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> SuiteResult:
        """Read what `save` wrote."""
        values = json.loads(Path(path).read_text())
        return cls(values["machine"], values["rows"])

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        m = self.machine
        title = f"{m['device']}, {m['threads']} of {m['cores']} threads, torch {m['torch']}, mbkit {m['mbkit']}"
        note = (
            "Times are ms a model and step; the others' speed is a multiple of sequential, by medians. Each side has "
            f"{ROUNDS} turns,\non one batch in float32 with Adam, mbkit in one process and what it is compared with in "
            "another; sequential trains the first 8\nmodels. A dash: it cannot train them, or is not installed."
        )
        return [(title, self.table()), (note, [])]


def run_suite(
    cases: Sequence[Case] = CASES, *, sides: Sequence[str] | None = None, progress: bool = True
) -> SuiteResult:
    """Measure all cases, each with every side that can train it.

    Args:
        cases: what to measure.
        sides: names out of BASELINES, "sequential" among them; all when absent.
        progress: show a bar.

    Returns:
        A SuiteResult.

    Raises:
        ValueError: an unknown side.

    Example:
        >>> result = run_suite([Case("MLP", 2, 8)], sides=["sequential", "mbkit"], progress=False)
        >>> sorted(result.rows[0]["seconds"])
        ['mbkit', 'sequential']
    """
    sides = list(BASELINES) if sides is None else list(sides)
    if unknown := [side for side in sides if side not in BASELINES]:
        raise ValueError(f"Expected sides out of {', '.join(BASELINES)}, got {', '.join(unknown)}.")
    result = SuiteResult(describe_machine(torch.device("cpu")))
    with Progress(len(cases), "suite", progress) as bar, Elsewhere() as elsewhere:
        for case in cases:
            result.rows.append(_measure(case, sides, elsewhere))
            bar.advance(f"{case.network}, M = {case.num_models}")
    return result


def _measure(case: Case, sides: Sequence[str], elsewhere: Elsewhere) -> dict[str, Any]:
    away = elsewhere.begin(case, [side for side in sides if side not in OWN], SECONDS)
    here = Turns(case, [side for side in sides if side in OWN], SECONDS)
    ready = [side for side in sides if side in (*away, *here.counts)]
    seconds: dict[str, list[float]] = {side: [] for side in ready}
    for turn in range(ROUNDS):
        for side in ready if turn % 2 == 0 else reversed(ready):
            seconds[side] += (elsewhere if side in away else here).turn(side)
    row = {"network": case.network, "num_models": case.num_models, "batch_size": case.batch_size}
    row["parameters"], row["how"] = here.parameters, here.how
    return {**row, "seconds": {side: [round(s, 9) for s in times] for side, times in seconds.items()}}
