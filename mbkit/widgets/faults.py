"""The explorer of faults: see what each looks like, or guess which one it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import ipywidgets as ipw

from ..common.random_streams import GENERATOR
from ..verify.diagnosis import Diagnosis, diagnose_planted
from ..verify.faults import FAULTS
from .explorer import Explorer, choice, keywords, log_range, on_change, slider, spread

__all__ = ["FaultExplorer", "explore_faults"]

NONE, ASK = "none", "?"


class FaultExplorer(Explorer):
    """Show how far three models in a batch with a planted fault are from the same models alone, and what diagnose says.

    Args:
        fault: "none", or a name in `faults.FAULTS`.
        rates: the lowest and the highest learning rate.
        seed: of the data, the models, and of what the fault leaves open.
        optimizer: "Adam" or "SGD" (with momentum 0.9).
        quiz: plant one at random, to be guessed first.

    Raises:
        ValueError: an unknown fault or optimizer.

    Example:
        >>> explorer = explore_faults("mean-loss", optimizer="SGD")
        >>> explorer.wait().report.guilty
        ['mean-loss']
        >>> explorer.close()
    """

    report: Diagnosis

    def __init__(
        self,
        fault: str = "stale-gradients",
        *,
        rates: tuple[float, float] = (0.01, 0.1),
        seed: int = 0,
        optimizer: str = "Adam",
        quiz: bool = False,
    ) -> None:
        self.fault = choice("fault", [NONE, *FAULTS], fault)
        self.optimizer = choice("optimizer", ("Adam", "SGD"), optimizer)
        self.rates = log_range("learning rates", *rates)
        self.seed = slider("seed", seed, 0, 100)
        self.quiz = ipw.ToggleButton(quiz, description="Quiz", tooltip="plant one at random, and guess which")
        self.guess = choice("my guess", [ASK, *FAULTS], ASK)
        super().__init__([(self.fault, self.optimizer), (self.rates, self.seed), (self.quiz, self.guess)], height=250)
        on_change((self.fault, self.optimizer, self.rates, self.seed), self._changed)
        on_change([self.quiz], self._ask)
        on_change([self.guess], self._say)
        self._ask()

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, as keywords of `diagnose_planted`."""
        rates = spread(*self.rates.value, 3)
        return {"rates": rates, "seed": self.seed.value, "optimizer": self.optimizer.value}

    @property
    def solved(self) -> bool:
        """Whether there is nothing to guess, or the guess is right."""
        return not self.quiz.value or self.guess.value == self._planted

    @property
    def call(self) -> str:
        """The code that reproduces the picture; in the quiz only when it is solved."""
        if not self.solved:
            return "explore_faults(quiz=True)"
        names = "" if self._planted == NONE else f"{self._planted!r}, "
        return f"diagnose_planted({names}{keywords(self.settings)}).plot()"

    def _ask(self) -> None:
        """Plant another fault at random, or in the end the one that the drop-down shows."""
        self.guess.value, self.fault.disabled = ASK, self.quiz.value
        self.guess.disabled = not self.quiz.value
        self._planted = random.choice([*FAULTS]) if self.quiz.value else self.fault.value
        self._changed()

    def _changed(self) -> None:
        if not self.quiz.value:
            self._planted = self.fault.value
        self.request(fault=self._planted, **self.settings)

    def _start(self, fault: str, **settings: Any) -> Iterator[None]:
        with GENERATOR:
            self.report = diagnose_planted(*([] if fault == NONE else [fault]), **settings)
        yield

    def _picture(self) -> bytes:
        return self.report.plot().frame()

    def _facts(self) -> dict[str, Any]:
        if not self.solved:
            wrong = "" if self.guess.value == ASK else f"not {self.guess.value}; "
            return {"quiz": f"{wrong}which fault is it?"}
        facts = {"quiz": "right!"} if self.quiz.value else {}
        guilty = self.report.guilty
        evidence = {"evidence": self.report.findings[guilty[0]].evidence} if guilty else {}
        return {**facts, "guilty": ", ".join(guilty) or NONE, "conclusion": self.report.conclusion, **evidence}


explore_faults = FaultExplorer
