"""What comes out of a consistency check, and how it is shown in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.checks import did_you_mean
from ..common.tables import Tables
from .demo import PRESETS, Demo

# What the library printed; only ever shown beside, or compared with, what is computed here.
PUBLISHED: dict[str, list[str]] = {
    "Sequential": ["49.3%", "67.3%", "80.7%"],
    "ModelBatch": ["50.7%", "76.7%", "80.7%"],
    "Diff": ["1.3%", "9.3%", "0.0%"],
}

# Half of the last decimal that the table prints, so that CONSISTENT means "the same table".
ACCURACY_TOLERANCE = 0.0005
# Accuracy hides most differences, so each model's parameters are judged too, in units of what one update moves them:
# its learning rate. Only the first steps count: there rounding stays far below this and every fault is far above.
# Later, training itself makes rounding grow, in float32 at high learning rates to any size.
PARAMETER_TOLERANCE, JUDGED_STEPS = 0.01, 5

SWITCHES = {"gradients": ("stale", "cleared"), "weights": ("other", "same"), "order": ("other", "same")}
DEMO_FAULTS = [f"{wrong}-{switch}" for switch, (wrong, _) in SWITCHES.items()]  # their names in `faults.FAULTS`


def switches(faults: Collection[str]) -> dict[str, str]:
    """Translate names of faults into the arguments of `run` that plant these and no others.

    Raises:
        ValueError: a fault that the demo does not have.

    Example:
        >>> switches(["stale-gradients"])
        {'gradients': 'stale', 'weights': 'same', 'order': 'same'}
    """
    unknown = sorted(set(faults) - set(DEMO_FAULTS))
    if unknown:
        raise ValueError(f"Expected a fault of the demo, got {unknown[0]!r}.{did_you_mean(unknown[0], DEMO_FAULTS)}")
    return {switch: wrong if f"{wrong}-{switch}" in faults else right for switch, (wrong, right) in SWITCHES.items()}


@dataclass(frozen=True, eq=False, repr=False)
class Outcome(Tables):
    """The same models trained alone and in a batch; prints itself as the library's table.

    Attributes:
        demo: what was trained.
        gradients: "stale" or "cleared".
        weights: "other" or "same" initial weights.
        order: "other" or "same" batches.
        accuracy_alone: [M], float64, from 0 to 1.
        accuracy_batched: likewise.
        parameter_difference: [steps, M], the largest absolute difference among a model's parameters after each step.
    """

    demo: Demo
    gradients: str
    weights: str
    order: str
    accuracy_alone: Tensor
    accuracy_batched: Tensor
    parameter_difference: Tensor

    @property
    def difference(self) -> Tensor:
        """The absolute difference of the accuracies, [M]."""
        return (self.accuracy_batched - self.accuracy_alone).abs()

    @property
    def max_difference(self) -> float:
        """The largest entry of `difference`."""
        return self.difference.max().item()

    @property
    def faults(self) -> list[str]:
        """The names, in `faults.FAULTS`, of what was planted."""
        return [f"{wrong}-{switch}" for switch, (wrong, _) in SWITCHES.items() if getattr(self, switch) == wrong]

    @property
    def parameters_agree(self) -> bool:
        """Whether the parameters differ by at most 1 % of a model's learning rate in the first five steps."""
        limits = PARAMETER_TOLERANCE * torch.tensor(self.demo.learning_rates, dtype=torch.float64)
        return bool((self.parameter_difference[:JUDGED_STEPS] <= limits).all())

    @property
    def verdict(self) -> str:
        """The word CONSISTENT where the accuracies agree to the printed decimal, and the parameters; else DIVERGENT."""
        return "CONSISTENT" if self.parameters_agree and self.max_difference <= ACCURACY_TOLERANCE else "DIVERGENT"

    def table(self) -> dict[str, list[str]]:
        """Return the library's table: three rows of M entries in percent."""
        rows = {"Sequential": self.accuracy_alone, "ModelBatch": self.accuracy_batched, "Diff": self.difference}
        return {name: [f"{value:.1%}" for value in row.tolist()] for name, row in rows.items()}

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        demo, steps = self.demo, len(self.parameter_difference)
        title = f"{self.gradients.capitalize()} gradients, {self.weights} initial weights, {self.order} order"
        title += f" of batches\n({demo.optimizer}, epochs: {demo.epochs}, seed: {demo.seed})"
        head = ["", *(f"Model {m}" for m in range(demo.num_models))]
        rates = ["learning rate", *(f"{rate:g}" for rate in demo.learning_rates)]
        tables = [(title, [head, rates, *([name, *row] for name, row in self.table().items())])]
        if demo == PRESETS["published"] and len(self.faults) == len(SWITCHES):
            tables.append(("As the library printed it", [head, *([name, *row] for name, row in PUBLISHED.items())]))
        judged = (
            f"Max difference: {self.max_difference:.1%}\n{self.verdict}\n(tolerance: {100 * ACCURACY_TOLERANCE:g} "
            f"percentage points; for parameters {PARAMETER_TOLERANCE:.0%} of the learning rate\nin the first "
            f"{JUDGED_STEPS} steps)"
        )
        if not self.faults and self.parameters_agree and self.verdict == "DIVERGENT":
            judged += "\nNothing was planted and the first steps agree: this is rounding, grown by training\n"
            judged += "at these rates." + (" Try dtype=torch.float64." if demo.dtype == torch.float32 else "")
        growth = [["after step", *head[1:]]]
        for step in sorted({step for step in (1, 2, 3, 5, 10, 30, 100, 300, 1000, steps) if step <= steps}):
            gaps = self.parameter_difference[step - 1].tolist()
            growth.append([f"{step}", *(f"{gap:.1e}" if gap else "0" for gap in gaps)])
        return [*tables, (judged, []), ("Largest difference of a parameter", growth)]


class Dissection(Tables, tuple):
    """The eight `Outcome`s of one demo, from all three faults to none; prints itself as one table.

    Attributes:
        causes: the names of the three faults, as in `Outcome.faults`.
    """

    causes = tuple(DEMO_FAULTS)

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        demo, steps = self[0].demo, len(self[0].parameter_difference)
        models = [f"m = {m}" for m in range(demo.num_models)]
        rows = [["grads", *list(SWITCHES)[1:], *models, "diff", "step 1", f"step {steps}", "verdict"]]
        rows.append(["(alone)", "", "", *self[0].table()["Sequential"], "", "", "", ""])
        for outcome in self:
            ends = outcome.parameter_difference[[0, -1]].amax(1).tolist()
            chosen = [getattr(outcome, switch) for switch in SWITCHES]
            accuracies = [*outcome.table()["ModelBatch"], f"{outcome.max_difference:.1%}"]
            rows.append([*chosen, *accuracies, *(f"{end:.0e}" if end else "0" for end in ends), outcome.verdict])
        title = "Accuracy, and the largest difference of a parameter from the same model alone\nafter two of the steps"
        # What another processor, which rounds in another way, may not print:
        elsewhere = "On another processor accuracies at high learning rates may be different: there\nrounding grows."
        if demo == PRESETS["published"]:
            elsewhere = (
                "On another processor accuracies at learning rate 0.1 may be different, except\nin the first row (as "
                "published) and in the last: at this rate rounding grows.\nThe verdicts are the same."
            )
        return [(title, rows), (f"{self._better()}\n{elsewhere}", [])]

    def _better(self) -> str:
        """Say whether stale gradients alone make a model look better than it should."""
        stale = next(outcome for outcome in self if outcome.faults == ["stale-gradients"])
        gain, m = (stale.accuracy_batched - stale.accuracy_alone).max(0)
        if gain <= ACCURACY_TOLERANCE:
            return "Stale gradients alone make no model look better here."
        alone, batched = stale.accuracy_alone[m], stale.accuracy_batched[m]
        return f"Stale gradients alone make model {m} look better: {batched:.1%}, where it has {alone:.1%} alone."
