"""The explorer of the published demo: everything that could explain its table has a control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..figures import plots
from ..lessons import consistency
from ..lessons.demo_result import ACCURACY_TOLERANCE, JUDGED_STEPS, PARAMETER_TOLERANCE, SWITCHES
from .controls import OPTIMIZERS, choice, log_range, slider, spread
from .explorer import Explorer


class ConsistencyExplorer(Explorer):
    """Show the demo trained alone and in the batch, with controls for everything that could explain its table.

    Another preset brings its own learning rates and optimizer; the other settings stay.

    Args:
        preset: "published", "quick" or "full".
        gradients: "stale" or "cleared". weights: "other" or "same". order: "other" or "same".
        **settings: of `consistency.Demo`, such as learning_rates (1 to 6), seed (0 to 100), optimizer.

    Raises:
        ValueError, TypeError: what `consistency.preset` and `consistency.run` refuse, and what no control can show.

    Example:
        >>> explorer = explore_consistency(gradients="cleared", weights="same", order="same")
        >>> explorer.wait().outcome.verdict
        'CONSISTENT'
        >>> explorer.seed.value = 7  # as a hand would; the picture follows
        >>> explorer.wait().outcome.demo.seed
        7
        >>> explorer.close()
    """

    opens = "explore_consistency"
    shows = (
        "Left: bars of each model's accuracy, alone and in the batch. Right: how far each model's parameters are from "
        "training alone, after each step."
    )
    note = (
        f"DIVERGENT: an accuracy differs by more than {100 * ACCURACY_TOLERANCE:g} points, or in the first "
        f"{JUDGED_STEPS} steps a parameter by more than {PARAMETER_TOLERANCE:.0%} of the learning rate."
    )
    outcome: consistency.Outcome

    def __init__(
        self,
        preset: str = "published",
        gradients: str = "stale",
        weights: str = "other",
        order: str = "other",
        **settings: Any,
    ) -> None:
        demo = consistency.preset(preset, **settings)
        ends = _ends(demo)
        self._rates, self._others = (ends, demo.learning_rates), settings
        stops = [rate for each in consistency.PRESETS.values() for rate in _ends(each)[:2]]
        rates, chosen = log_range(*ends[:2], *stops), choice("optimizer", OPTIMIZERS, demo.optimizer)
        switches = {"gradients": gradients, "weights": weights, "order": order}
        rows = [
            {"preset": choice("preset", list(consistency.PRESETS), preset), "optimizer": chosen},
            {"rates": rates, "models": slider("models M", ends[2], 1, 6), "seed": slider("seed", demo.seed, 0, 100)},
            {name: choice(name, SWITCHES[name], value) for name, value in switches.items()},
        ]
        super().__init__(rows)

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, as arguments of `explore_consistency`."""
        values = super().settings
        shown = (*values.pop("rates"), values.pop("models"))
        rates = self._rates[1] if shown == self._rates[0] else spread(*shown)  # a list need not be evenly spaced
        return {**self._others, **values, "learning_rates": rates}

    def _changed(self, name: str) -> None:
        if name == "preset":
            demo = consistency.PRESETS[self.preset.value]
            self._rates = _ends(demo), demo.learning_rates
            self.optimizer.value = demo.optimizer
            low, high, self.models.value = self._rates[0]
            self.rates.value = low, high
        super()._changed(name)

    def _start(self, preset: str, gradients: str, weights: str, order: str, **settings: Any) -> Iterator[None]:
        demo = consistency.preset(preset, **settings)
        for self.outcome in consistency.walk(demo, gradients, weights, order):
            yield

    def _picture(self) -> bytes:
        return plots.consistency(self.outcome).frame()

    def _facts(self) -> dict[str, Any]:
        outcome = self.outcome
        ends = {"step": len(outcome.parameter_difference), "largest-difference": f"{outcome.max_difference:.1%}"}
        return {**ends, "verdict": outcome.verdict, "faults": ", ".join(outcome.faults) or "none"}


def _ends(demo: consistency.Demo) -> tuple[float, float, int]:
    """Return what the sliders show of a demo's learning rates: the lowest, the highest, and their number."""
    rates = demo.learning_rates
    return min(rates), max(rates), len(rates)


explore_consistency = ConsistencyExplorer
