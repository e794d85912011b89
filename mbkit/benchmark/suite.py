"""The benchmark suite: every way to train M models, case by case, in turns, as ratios of medians."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.files import write_bytes
from ..common.machine import describe_machine, measure_peak_memory, tune_malloc
from ..common.process import Worker
from ..common.progress import Progress
from ..common.tables import Tables
from .baselines import BASELINES, LOOP, LOOP_AS_IT_IS
from .cases import CASES, Case
from .result import Timing, title_of

ROUNDS = 5
SECONDS = 0.2  # that a side's turn lasts, about, unless one step is longer
_LONE = 8  # models that a loop trains in turn, and each process of a pool: all M would only take longer
_WARM_UP, _MOST = 4, 50  # steps until all is compiled, allocated and chosen; steps in a turn


@dataclass(eq=False, repr=False)
class SuiteResult(Tables):
    """What the suite measured; it prints as tables.

    Attributes:
        rows: a dict a case: "network", "num_models", "batch_size", "parameters", "how" (what fit chose), and for each
            side by its name "seconds", raw times a model and step; "costs", what it takes to get there (see `Turns`);
            and, where there is neither, "missing", why.
        machine: device, threads and versions.
    """

    machine: dict[str, Any]
    rows: list[dict[str, Any]]

    def sides(self) -> list[str]:
        """Return the sides that were measured, but for the loop that the others are compared with."""
        every = {side for row in self.rows for side in row["seconds"] if side != self.loop_of(row)}
        return [side for side in BASELINES if side in every]

    @staticmethod
    def loop_of(row: dict[str, Any]) -> str:
        """Return the name of the loop that the other sides of a row are compared with."""
        return LOOP if LOOP in row["seconds"] else LOOP_AS_IT_IS

    def timing(self, row: dict[str, Any], side: str) -> Timing | None:
        """Return a side's median and quartiles, in seconds a model and step; None where it was not run."""
        seconds = row["seconds"].get(side)
        return None if seconds is None else Timing.of(torch.tensor(seconds, dtype=torch.float64))

    def ratio(self, row: dict[str, Any], side: str, over: str = "") -> float | None:
        """Return how many times as fast a side is as another: the ratio of their medians.

        Args:
            over: the other one; when absent a loop over the models with the malloc setting that all sides have or,
                where there is none, the loop that there is.
        """
        mine, other = self.timing(row, side), self.timing(row, over or self.loop_of(row))
        return None if mine is None or other is None else other.median / mine.median

    def table(self) -> list[list[str]]:
        """Return the rows of the table of speeds as text; the first is the header."""
        sides = [side for side in self.sides() if side != LOOP_AS_IT_IS]
        lines = [["network", "M", "batch", "a loop, ms (quartiles)", "malloc alone", *sides, "fit chose"]]
        for row in self.rows:
            ratios = [self.ratio(row, LOOP, LOOP_AS_IT_IS), *(self.ratio(row, side) for side in sides)]
            times = ["-" if ratio is None else f"{ratio:.2f} x" for ratio in ratios]
            lines.append([*_sizes(row), str(self.timing(row, self.loop_of(row)) or "-"), *times, row["how"]])
        return lines

    def costs(self) -> list[list[str]]:
        """Return the rows of the table of mbkit's costs, before and in the steps."""
        head = ["M modules, s", "batch, s", "first step, s", "compiled, s", "step, µs a model", "MB", "kB a model"]
        lines = [["network", "M", "batch", *head]]
        for row in self.rows:
            if own := row["costs"].get("mbkit"):
                first = row["costs"].get("mbkit compiled", {}).get("first")
                times = ["-" if t is None else f"{t:.3g}" for t in (own["models"], own["build"], own["first"], first)]
                step, memory = 1e6 * self.timing(row, "mbkit").median, own["memory"]
                kept = ["-"] * 2 if memory is None else [f"{memory / s:.1f}" for s in (1e6, 1e3 * row["num_models"])]
                lines.append([*_sizes(row), *times, f"{step:.3g}", *kept])
        return lines if len(lines) > 1 else []

    def save(self, path: str | Path) -> None:
        """Write everything, raw times included, as JSON; folders are made, and an old file is replaced as a whole."""
        write_bytes(Path(path), json.dumps({"kind": "suite", **vars(self)}, allow_nan=False).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> SuiteResult:
        """Read what `save` wrote."""
        values = json.loads(Path(path).read_text())
        return cls(values["machine"], values["rows"])

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        fair = any(LOOP in row["seconds"] for row in self.rows)
        malloc = "each in a process of its own\nwith the same malloc setting" if fair else "malloc set\nfor mbkit alone"
        note = (
            "The loop's times are ms a model and step; the other columns are multiples of its speed, by medians. It "
            f"trains the\nfirst {_LONE} models. All sides have {ROUNDS} turns on one batch in float32 with Adam, "
            f"{malloc}.\nmalloc alone: this loop against one without the setting. A dash: not measured."
        )
        reasons = sorted({f"{side}: {why}" for row in self.rows for side, why in row.get("missing", {}).items()})
        title = "What mbkit takes to get there, and the peak of its memory without the modules"
        costs = [(title, self.costs())] if self.costs() else []
        return [(title_of(self.machine), self.table()), ("\n".join([note, *reasons]), []), *costs]


def _sizes(row: dict[str, Any]) -> list[str]:
    return [row["network"], f"{row['num_models']}", str(row["batch_size"])]


def run_suite(
    cases: Sequence[Case] = CASES,
    *,
    sides: Sequence[str] | None = None,
    minutes: float | None = None,
    patience: float = 180.0,
    save: str | Path | None = None,
    progress: bool = True,
) -> SuiteResult:
    """Measure all cases, each with every side that can train it.

    Each side has a process of its own, with the caller's number of threads, the same malloc setting (but for one more
    loop, whose process has none) and the same batch. The processes wait while another one has its turn.

    Args:
        cases: what to measure.
        sides: names out of BASELINES; all when absent.
        minutes: after so many no case is begun, and no side of the present one is made ready.
        patience: seconds that a side may take until it is ready, compilation included.
        save: a file that is written after each case.
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
    result = SuiteResult(describe_machine(torch.device(cases[0].device)), [])
    end, workers = time.monotonic() + 60 * (minutes or 1e6), {}
    with Progress(len(cases), "suite", progress) as bar, ExitStack() as stack:
        for case in cases:
            if time.monotonic() > end:
                break
            for side in sides:
                if side not in workers or workers[side].ended:
                    workers[side] = stack.enter_context(Worker())
            row = _measure(case, {side: workers[side] for side in sides}, patience, end)
            if row["seconds"]:
                result.rows.append(row)
            if save is not None:
                result.save(save)
            bar.advance(lambda case=case: f"{case.network}, M = {case.num_models}")
    return result


def _measure(case: Case, workers: dict[str, Worker], patience: float, end: float) -> dict[str, Any]:
    """Return a case's row."""
    row = {"network": case.network, "num_models": case.num_models, "batch_size": case.batch_size}
    row |= {"parameters": case.parameters, "how": "", "seconds": {}, "costs": {}, "missing": {}}

    def ask(side: str, *question: Any, limit: float = patience) -> Any:
        try:
            return workers[side].ask(*question, patience=limit)
        except Exception as error:
            row["missing"][side] = (str(error).strip() or type(error).__name__).splitlines()[0]
            row["seconds"].pop(side, None)
            return None

    for side in workers:
        limit = min(patience, max(1.0, end - time.monotonic()))
        ask(side, Turns, side, case, SECONDS, torch.get_num_threads(), limit=limit)
        if side not in row["missing"]:
            row["seconds"][side], row["costs"][side] = [], ask(side, "costs")
    for turn in range(ROUNDS):
        ready = list(row["seconds"])
        for side in ready if turn % 2 == 0 else reversed(ready):
            times = ask(side, "turn")
            row["seconds"].get(side, []).extend(round(s, 9) for s in times or ())
    if "mbkit" in row["seconds"]:
        row["how"] = ask("mbkit", "how")
    return row


class Turns:
    """A side that trains a case's models in the present process, warmed up.

    Args:
        name: out of BASELINES.
        case: the models and their batch.
        seconds: that a turn lasts, about, unless one step is longer.
        threads: of torch.
    """

    def __init__(self, name: str, case: Case, seconds: float, threads: int) -> None:
        torch.set_num_threads(threads)
        if name != LOOP_AS_IT_IS:
            tune_malloc()
        if hasattr(os, "sched_setaffinity"):  # JAX, for one, counts the cores that it may use
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        lone = {LOOP: _LONE, LOOP_AS_IT_IS: _LONE, "process pool": _LONE * threads}
        count = min(case.num_models, lone.get(name, case.num_models))
        self._batch, given = case.data(), (torch.optim.Adam, case.configs()[:count], range(count))
        # What is loaded once in a process is no cost of M models; a side with malloc as it is must not meet mbkit.
        loaded = "mbkit" if name.startswith("mbkit") else LOOP_AS_IT_IS
        BASELINES[loaded](case.models(1), torch.optim.Adam, [{"lr": 0.0}], [0]).run([self._batch])
        start = time.perf_counter()
        models = case.models(count)
        self._costs = {"models": time.perf_counter() - start}
        with measure_peak_memory(torch.device(case.device)) as peak:
            start = time.perf_counter()
            self._side = BASELINES[name](models, *given)
            self._costs["build"] = time.perf_counter() - start
            self._costs["first"] = self._run(1)[0] * self._side.num_models
            self._run(_WARM_UP - 1)
        self._costs["memory"] = None if name == "process pool" else peak.bytes
        self._count = int(min(_MOST, max(1, seconds / self._side.num_models / min(self._run(2)))))
        self._pause()

    def costs(self) -> dict[str, float | None]:
        """Return the seconds for "models", M modules; "build", all else before the "first" step; and peak "memory"."""
        return self._costs

    def how(self) -> str:
        """Return what fit chose."""
        return self._side.stepper.how

    def turn(self) -> list[float]:
        """Make the steps of one turn, after one that warms up; return the seconds that each took, per model."""
        self._run(1)  # untimed: the other sides' turns have emptied the caches, and on a GPU the pause its memory
        seconds = self._run(self._count)
        self._pause()
        return seconds

    def _pause(self) -> None:
        if self._batch[1].is_cuda:
            torch.cuda.empty_cache()  # the other sides have a use for it meanwhile

    def _run(self, count: int) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a side has to say about its speed is what is measured
            warnings.filterwarnings("error", message="compile=True")  # or it would be another side
            self._side.run([self._batch] * count)
        return (self._side.seconds()[-count:].sum(1) / self._side.num_models).tolist()
