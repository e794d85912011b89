"""The explorer of the published demo: everything that could explain its table has a control."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ..figures import plots
from ..lessons import consistency
from ..lessons.demo_result import SWITCHES
from .explorer import OPTIMIZERS, Explorer, choice, keywords, log_range, on_change, slider, spread

__all__ = ["ConsistencyExplorer", "explore_consistency"]


class ConsistencyExplorer(Explorer):
    """Show the demo trained alone and in the batch, with sliders for everything that could explain its table.

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
        rates = demo.learning_rates
        self._given, self._others = ((min(rates), max(rates), len(rates)), rates), settings
        self.preset = choice("preset", list(consistency.PRESETS), preset)
        self.rates = log_range("learning rates", min(rates), max(rates))
        self.models = slider("models M", len(rates), 1, 6)
        self.seed = slider("seed", demo.seed, 0, 100)
        self.optimizer = choice("optimizer", OPTIMIZERS, demo.optimizer)
        switches = {"gradients": gradients, "weights": weights, "order": order}
        self.switches = {name: choice(name, SWITCHES[name], value) for name, value in switches.items()}
        rows = [(self.preset, self.optimizer), (self.rates, self.models, self.seed), (*self.switches.values(),)]
        super().__init__(rows, height=320)
        on_change(itertools.chain(*rows), self._changed)
        self._changed()

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, as arguments of `explore_consistency`."""
        shown = (*self.rates.value, self.models.value)
        rates = self._given[1] if shown == self._given[0] else spread(*shown)  # a list need not be evenly spaced
        chosen = {name: control.value for name, control in self.switches.items()}
        named = {"learning_rates": rates, "seed": self.seed.value, "optimizer": self.optimizer.value}
        return {"preset": self.preset.value, **chosen, **self._others, **named}

    @property
    def call(self) -> str:
        """The code that reproduces the picture."""
        settings = self.settings
        switches = keywords({name: settings.pop(name) for name in SWITCHES})
        demo = f"preset({settings.pop('preset')!r}, {keywords(settings)})"
        return f"plots.consistency(consistency.run(consistency.{demo}, {switches}))"

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


explore_consistency = ConsistencyExplorer
