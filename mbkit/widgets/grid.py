"""What the two explorers of learning rates share: a grid of networks in one batch, and sliders that mark one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as ipw
from torch import nn

from ..common.checks import whole_number
from .explorer import OPTIMIZERS, Explorer, choice, keywords, on_change

__all__ = ["GridExplorer", "check_size"]

MOST_NETWORKS, MOST_LOSSES = 256 * 256, 2**28  # the losses of all steps are kept: a gigabyte in float32


class GridExplorer(Explorer):
    """A grid of networks that differ in their learning rates, in one batch; some controls only mark one of them.

    A subclass calls `_describe` before it makes its controls, and this class's `__init__` with them.
    """

    def __init__(self, rows: Sequence[Sequence[ipw.Widget]], marks: Sequence[ipw.Widget], height: int) -> None:
        super().__init__(rows, height)
        on_change((control for row in rows for control in row if control not in marks), self._changed)
        on_change(marks, self.worker.redraw)
        self._changed()

    def _describe(
        self,
        name: str,
        build: Callable[[], nn.Module] | None,
        batches: Any,
        optimizer: str,
        steps: int,
        named: Mapping[str, Any],
    ) -> None:
        """Keep what all of them have; a lambda has no name that a line of code could use.

        Raises:
            ValueError: only one of build and batches; an unknown optimizer; fewer than 1 step.
        """
        if (build is None) != (batches is None):
            raise ValueError("Expected both build and batches, or neither for the demo's: got one of them.")
        own = getattr(build, "__name__", "build")
        own = own if own.isidentifier() else "build"
        self._called = f"{name}(" if build is None else f"{name}({own}, batches, "
        self.steps, self._named = whole_number(steps, "steps"), dict(named)
        self.optimizer = choice("optimizer", OPTIMIZERS, optimizer)

    @property
    def call(self) -> str:
        """The code that reproduces the picture."""
        return f"{self._called}{keywords({**self.settings, 'steps': self.steps, **self._named})})"


def check_size(networks: int, steps: int) -> None:
    """Refuse a grid that would take more memory or time than anybody wants of a slider, before anything is allocated.

    Raises:
        ValueError: there are too many networks, or losses to be kept.
    """
    if networks > MOST_NETWORKS:
        raise ValueError(f"Expected at most {MOST_NETWORKS:,} networks, got {networks:,}: make the grid smaller.")
    if networks * steps > MOST_LOSSES:
        raise ValueError(
            f"Expected at most {MOST_LOSSES // networks:,} steps for {networks:,} networks, got {steps:,}: every loss "
            "is kept, so use fewer steps or networks."
        )
