"""A progress bar that suits where it runs: a widget in a notebook, tqdm on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["Progress"]

_REDRAW_SECONDS = 0.1  # a message to the browser costs more than a small model's training step


class Progress(AbstractContextManager):
    """Show how many of `total` steps are done; close it, or use it in a `with` statement, and it goes.

    In a Jupyter kernel it is a widget whose output is emptied on closing, so that a saved notebook keeps no
    frozen bar; on a terminal it is tqdm; where standard error is neither (a test, a log file, a notebook
    run that has no widgets) nothing is written at all.

    Args:
        total: the number of steps, or None where it is not known.
        label: a word or two in front of the bar. enabled: False for silence everywhere.
    """

    def __init__(self, total: int | None, label: str = "", enabled: bool = True):
        self.done = 0
        self._total = total
        self._drawn = 0.0
        self._bar = _make_bar(total, label) if enabled else None

    def advance(self, text: Callable[[], str] | None = None, steps: int = 1) -> None:
        """Count steps; `text` is called only when the bar is redrawn, so it may cost a device's answer."""
        self.done += steps
        if self._bar is None:
            return
        now = time.perf_counter()
        if now - self._drawn > _REDRAW_SECONDS or self.done == self._total:
            self._drawn = now
            self._bar.draw(self.done, text() if text else "")

    def close(self) -> None:
        """Take the bar away; closing twice is harmless."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def __exit__(self, *_: Any) -> None:
        self.close()


def _make_bar(total: int | None, label: str) -> _Widget | _Terminal | None:
    ipython = sys.modules.get("IPython")  # a kernel has imported it long ago; nobody else should pay for it
    shell = ipython.get_ipython() if ipython else None
    if hasattr(shell, "kernel"):
        try:
            return _Widget(total, label)
        except ImportError:
            return None
    if sys.stderr is not None and sys.stderr.isatty():
        return _Terminal(total, label)
    return None


class _Widget:
    def __init__(self, total: int | None, label: str):
        import ipywidgets
        from IPython.display import display

        self._total = total
        self._bar = ipywidgets.IntProgress(max=total or 1, description=label, style={"description_width": "initial"})
        self._text = ipywidgets.Label()
        self._box = ipywidgets.HBox([self._bar, self._text])
        self._output = display(self._box, display_id=True)

    def draw(self, done: int, text: str) -> None:
        self._bar.value = done if self._total else 0
        self._text.value = f"{done} of {self._total or '?'} steps  {text}"

    def close(self) -> None:
        for widget in (self._bar, self._text, self._box):
            widget.close()
        # Closing alone leaves "HBox(children=...)" behind on pages where no kernel runs.
        self._output.update({"text/html": "", "text/plain": ""}, raw=True)


class _Terminal:
    def __init__(self, total: int | None, label: str):
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=label or None, unit="step", leave=False, mininterval=0)

    def draw(self, done: int, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()
