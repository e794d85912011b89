"""The explorer of faults: see what each looks like, or guess which one it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import ipywidgets as ipw

from ..common.random_streams import GENERATOR
from ..verify.diagnosis import Diagnosis, diagnose_planted
from ..verify.faults import FAULTS
from .controls import choice, log_range, slider, spread
from .explorer import Explorer

NONE, ASK = "none", "?"
IN_WORDS = {
    "gradients are never cleared": "stale-gradients",
    "other initial weights": "other-weights",
    "the data in another order": "other-order",
    "other dropout masks": "other-masks",
    "eval mode in place of train mode": "other-mode",
    "a wrong gradient": "wrong-gradient",
    "the loss averaged over the models": "mean-loss",
    "one norm clips all models": "clipped-across-models",
    "model 0's learning rate for all": "setting-of-model-0",
    "models share the optimizer's state": "shared-optimizer-state",
    "an update leaks into another model": "leaking-update",
    "models share memory": "shared-memory",
    "the schedule runs M times as fast": "schedule-stepped-M-times",
}


class FaultExplorer(Explorer):
    """Show how far three models in a batch with a planted fault are from the same models alone, and what diagnose says.

    In the quiz the fault is drawn at random. Many faults look alike in the picture; what tells them apart is an
    experiment for each: "Clue" shows what the one that found the fault has measured, and a wrong guess what clears it.

    Args:
        fault: "none", or a name in `faults.FAULTS`.
        rates: the lowest and the highest learning rate; the third is between them.
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

    opens = "explore_faults"
    shows = (
        "One panel for each model: how far each of its parameters is from training alone, step by step. Light is "
        "rounding, dark is a difference."
    )
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
        words = {NONE: NONE, **IN_WORDS}
        rows = [
            {"fault": choice("fault", words, fault), "optimizer": choice("optimizer", ("Adam", "SGD"), optimizer)},
            {"rates": log_range(*rates), "seed": slider("seed", seed, 0, 100)},
            {
                "quiz": ipw.ToggleButton(quiz, description="Quiz", tooltip="plant one at random, and guess which"),
                "guess": choice("my guess", {ASK: ASK, **IN_WORDS}, ASK),
                "clue": ipw.ToggleButton(description="Clue", tooltip="what the experiment that finds it has measured"),
                "another": ipw.Button(description="Next", tooltip="plant another one"),
            },
        ]
        for control in (rows[0]["fault"], rows[2]["guess"]):
            control.layout.width = "28em"
        self._planted = fault
        super().__init__(rows, marks=("quiz", "guess", "clue", "another"), height=236)
        self.another.on_click(lambda _: self._plant())
        self._plant()

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, and which fault is planted."""
        return super().settings | {"fault": self._planted}

    @property
    def solved(self) -> bool:
        """Whether there is nothing to guess, or the guess is right."""
        return not self.quiz.value or self.guess.value == self._planted

    @property
    def call(self) -> str:
        """The code that reproduces the picture; in the quiz only when it is solved."""
        return super().call if self.solved else "widgets.explore_faults(quiz=True)"

    def _plant(self) -> None:
        """Plant another fault at random, or outside the quiz the one that the drop-down shows."""
        asked = self.quiz.value
        self.fault.disabled, self.guess.disabled, self.clue.disabled, self.another.disabled = asked, *[not asked] * 3
        self.guess.value, self.clue.value = ASK, False
        others = [name for name in FAULTS if name != self._planted]
        self._planted = random.choice(others) if asked else self.fault.value
        self.request()

    def _changed(self, name: str) -> None:
        if name in ("quiz", "fault"):
            self._plant()
        else:
            super()._changed(name)

    def _start(self, fault: str, rates: tuple[float, float], **settings: Any) -> Iterator[None]:
        with GENERATOR:
            self.report = diagnose_planted(*([] if fault == NONE else [fault]), rates=spread(*rates, 3), **settings)
        yield

    def _picture(self) -> bytes:
        return self.report.plot().frame()

    def _facts(self) -> dict[str, Any]:
        report, guess = self.report, self.guess.value
        if self.solved:
            found = {"guilty": ", ".join(report.guilty) or NONE, "conclusion": report.conclusion}
            evidence = {"evidence": report.findings[report.guilty[0]].evidence} if report.guilty else {}
            return {**({"quiz": "right!"} if self.quiz.value else {}), **found, **evidence}
        wrong = "" if guess == ASK else f"not {guess}, for {report.findings[guess].evidence}; "
        clue = {"clue": "; ".join(report.findings[name].evidence for name in report.guilty)} if self.clue.value else {}
        return {"quiz": f"{wrong}which fault is it?", **clue}


explore_faults = FaultExplorer
