"""What `compare` has found, and what `diagnose` has about one suspect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.tables import Tables, plain

# So many times the noise floor is allowed, for rounding of another kind is not rounding of another size; less where
# numbers are so coarse that the noise floor is nearly the size of a fault, and was made by several last bits.
FLOOR_FACTOR, COARSE_FACTOR = 30.0, 3.0


@dataclass(frozen=True, eq=False, repr=False)
class EquivalenceReport(Tables):
    """How far M models trained in a batch are from the same models trained alone, and how far rounding goes.

    Attributes:
        parameters: the P parameters' names.
        difference: [steps, M, P], the largest absolute difference of each parameter after each step.
        relative: [steps, M, P], the length of a parameter's whole difference over the way it has come from its start.
        loss_difference: [steps, M], absolute.
        floors: noise source to [steps, M, P], the same as `relative` for a lone model against itself. A parameter
            whose true gradient is zero, such as a bias before BatchNorm, is nothing but noise under Adam: its floor
            says so, and no other parameter's has to suffer for it.
        tolerance: the relative difference that is allowed where the noise floor is lower still.
        lost: [steps, M], where all that model m trains is no number (NaN, or infinite) alone: it tells nothing then.

    A NaN in the same place on both sides is alike, one anywhere else is a difference. `relative` is NaN for a parameter
    that has no number alone any more.
    """

    parameters: list[str]
    difference: Tensor
    relative: Tensor
    loss_difference: Tensor
    floors: dict[str, Tensor]
    tolerance: float
    lost: Tensor

    @property
    def floor(self) -> Tensor:
        """[steps, M, P], the largest of the noise floors."""
        return torch.stack(list(self.floors.values())).nan_to_num(nan=0.0).amax(0)

    @property
    def allowed(self) -> Tensor:
        """[steps, M, P], what counts as rounding."""
        factor = FLOOR_FACTOR if self.tolerance < 1e-2 else COARSE_FACTOR
        return (factor * self.floor.cummax(0).values).clamp(min=self.tolerance)

    @property
    def within(self) -> Tensor:
        """[steps, M, P], whether each parameter is within what rounding explains, or alike where it is no number."""
        return (self.relative <= self.allowed) | self.relative.isnan()

    @property
    def unknown(self) -> list[int]:
        """The models of which nothing can be told, because alone they are no numbers from the first step on."""
        return self.lost[0].nonzero().flatten().tolist()

    @property
    def equivalent(self) -> bool:
        """Whether every model at every step is within what rounding explains, and of each something can be told."""
        return bool(self.within.all()) and not self.unknown

    @property
    def verdict(self) -> str:
        """The finding in one sentence."""
        steps, num_models, _ = self.relative.shape
        wrong = (~self.within).nonzero()
        if len(wrong):
            step, m, _ = wrong[0].tolist()
            p = int(self._excess(step)[m].argmax())
            return (
                f"DIFFERENT: from step {step + 1} on model {m} is not the model trained alone. "
                f"Its '{self.parameters[p]}' is off by {self.relative[step, m, p].item():.1e} of its way, where "
                f"rounding explains {self.allowed[step, m, p].item():.1e}."
            )
        if self.unknown:
            return (
                f"CANNOT TELL: alone and in the batch all that model {self.unknown[0]} trains is no number from step 1 "
                f"on ({len(self.unknown)} of {num_models} models are so). Look for NaN in the data and in the loss."
            )
        lost = self.lost.any(0).nonzero().flatten().tolist()
        until = f" Of model {lost[0]} that holds until it diverges, alone as in the batch." if lost else ""
        return (
            f"EQUIVALENT: over {steps} steps all parameters of the {num_models} models stay within rounding of "
            f"those trained alone.{until} Typically (in the median) they are {self.relative.nanmedian().item():.1e} of "
            f"their way apart, and a lone model {self.floor.median().item():.1e} from itself."
        )

    def assert_equivalent(self) -> None:
        """Raise an AssertionError with the verdict unless batch and models are equivalent."""
        if not self.equivalent:
            raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, fit for JSON; what is not finite becomes None."""
        return plain({"verdict": self.verdict, "equivalent": self.equivalent, **vars(self)})

    def plot(self) -> Any:
        """Return a figure: how far each parameter is, step by step, one panel a model."""
        from ..figures.plots import heat_map

        return heat_map(self)

    def _excess(self, step: int) -> Tensor:
        """[M, P], how many times what is allowed each parameter is off after a step."""
        ratio = (self.relative[step] / self.allowed[step]).nan_to_num(nan=0.0, posinf=torch.inf)
        return ratio.masked_fill(~self.within[step] & (ratio <= 1), torch.inf)

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        steps = len(self.relative)
        shown = sorted({s for s in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, steps) if s <= steps})
        rows = [["after step", "largest difference", "in", "of its way", "rounding explains", *self.floors]]
        for step in shown:
            nearest = int(self._excess(step - 1).argmax())  # to the limit, of all models' parameters
            m, p = divmod(nearest, len(self.parameters))
            values = [self.relative, self.allowed, *self.floors.values()]
            numbers = [f"{value[step - 1, m, p].item():.1e}" for value in values]
            largest = f"{self.difference[step - 1, m, p].item():.1e}"
            rows.append([f"{step}", largest, f"{self.parameters[p]} of model {m}", *numbers])
        return [(self.verdict, []), ("", rows)]


@dataclass(frozen=True)
class Finding:
    """What was found out about one suspect.

    Attributes:
        suspect: its name, one of `faults.FAULTS` or "rounding".
        verdict: "guilty", "cleared" or "not measured"; of rounding that explains the whole difference "all there is".
        evidence: what was measured.
        model, parameter, step: where it shows most, and from which step on.
        size: how large the difference is, relative to what it is a difference of.
    """

    suspect: str
    verdict: str
    evidence: str
    model: int | None = None
    parameter: str | None = None
    step: int | None = None
    size: float | None = None


def finding(suspect: str, guilty: bool | None, evidence: str, **where: Any) -> Finding:
    """Return a Finding: guilty, cleared, or not measured where `guilty` is None."""
    verdict = "not measured" if guilty is None else "guilty" if guilty else "cleared"
    return Finding(suspect, verdict, evidence, **(where if guilty else {}))
