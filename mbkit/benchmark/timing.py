"""The sides of a benchmark, ready for their turns: here, or in a process that mbkit has not set up.

`fit` has malloc keep what is freed (`machine.tune_malloc`), which is a setting of the whole process. In such a process
modelbatch and naive vmap train 16 LeNets 1.4 to 1.7 times as fast as they do for those who use them, so what mbkit is
compared with gets a process of its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch

from .baselines import BASELINES, Side
from .cases import Case

__all__ = ["Elsewhere", "Turns"]

_LONE = 8  # models that the sequential side trains in turn: all M would only take longer
_WARM_UP = 40  # steps at most until all is compiled, allocated and chosen


class Turns:
    """Sides that can train a case's models, in this process, warmed up.

    Args:
        case: the models and their batch.
        sides: names out of BASELINES.
        seconds: that a turn lasts, about, unless one step is longer.

    Attributes:
        counts: how many steps a turn has, by the side; those that cannot train the models are left out.
        how: what fit chose. parameters: of one model.
    """

    def __init__(self, case: Case, sides: Sequence[str], seconds: float) -> None:
        gc.collect()  # of the case before
        self._batch, models = case.data(), case.models()
        self.parameters = sum(p.numel() for p in models[0].parameters())
        configs = [{"lr": rate} for rate in torch.logspace(-4, -2, case.num_models).tolist()]
        self._made: dict[str, Side] = {}
        self.counts: dict[str, int] = {}
        for name in sides:
            count = min(_LONE, case.num_models) if name == "sequential" else case.num_models
            side = BASELINES[name](models[:count], torch.optim.Adam, configs[:count], range(count))
            fit_into_a_turn = 0 if side is None else self._warm_up(side, seconds)
            if fit_into_a_turn:
                self._made[name], self.counts[name] = side, fit_into_a_turn
        self.how = self._made["mbkit"].stepper.how if "mbkit" in self._made else ""

    def turn(self, name: str) -> list[float]:
        """Make the steps of one turn; return the seconds that each took, per model."""
        return self._steps(self._made[name], self.counts[name])

    def _steps(self, side: Side, count: int) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a side has to say about its speed is what is measured
            side.run([self._batch] * count)
        return (side.seconds()[-count:].sum(1) / side.num_models).tolist()

    def _warm_up(self, side: Side, turn: float) -> int:
        """Make steps until nothing is left to be set up; return how many fit into a turn, 0 if it cannot train."""
        try:
            for _ in range(_WARM_UP):
                [seconds] = self._steps(side, 1)
                if getattr(side.stepper, "settled", True):
                    break
        except RuntimeError:
            return 0
        again = self._steps(side, 2 if seconds * side.num_models < 1 else 1)
        return int(min(50, max(1, turn / side.num_models / min(again))))


class Elsewhere:
    """Turns in another process, which waits, without using a core, until it is asked."""

    def __enter__(self) -> Elsewhere:
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", "from mbkit.benchmark.timing import attend; attend()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=os.environ | paths, **pipes)
        self._ask("threads", torch.get_num_threads())
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def begin(self, case: Case, sides: Sequence[str], seconds: float) -> list[str]:
        """Make these sides ready; return those that can train the case's models."""
        return self._ask("begin", astuple(case), list(sides), seconds)

    def turn(self, side: str) -> list[float]:
        """Do what `Turns.turn` does."""
        return self._ask("turn", side)

    def _ask(self, *question: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process that measures other libraries ended ({self._process.wait()}).")
        return json.loads(answer)


def attend() -> None:
    """Answer the questions on standard input, a line of JSON each; what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    turns = None
    for line in sys.stdin:
        answer: Any = None
        match json.loads(line):
            case "threads", threads:
                torch.set_num_threads(threads)
            case "begin", fields, sides, seconds:
                turns = None  # before the next models take their memory
                turns = Turns(Case(*fields), sides, seconds)
                answer = list(turns.counts)
            case "turn", side:
                answer = turns.turn(side)
        print(json.dumps(answer), file=answers, flush=True)
