"""A progress bar that suits where it runs: a widget in a notebook, tqdm on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

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
        self._bar, self._output = _make_bar(total, label) if enabled else (None, None)

    def advance(self, text: Callable[[], str] | None = None, steps: int = 1) -> None:
        """Count steps; `text` is called only when the bar is redrawn, so it may cost a device's answer."""
        self.done += steps
        if self._bar is not None and self._bar.update(steps) and text is not None:
            self._bar.set_postfix_str(text())

    def close(self) -> None:
        """Take the bar away; closing twice is harmless."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.refresh()  # the last step is always drawn
            bar.close()
        if bar is not None and self._output is not None:
            bar.container.close()  # which tqdm leaves open where steps are missing
            # Closing alone leaves "HBox(children=...)" behind on pages where no kernel runs.
            self._output.update({"text/html": "", "text/plain": ""}, raw=True)

    def __exit__(self, *_: Any) -> None:
        self.close()


def _make_bar(total: int | None, label: str) -> tuple[Any, Any]:
    """Return a bar of tqdm's, and the notebook's output that it is shown in; None for what there is not."""
    how = {"total": total, "desc": label or None, "unit": "step", "leave": False}
    how |= {"mininterval": _REDRAW_SECONDS, "miniters": 1}
    ipython = sys.modules.get("IPython")  # a kernel has imported it already; elsewhere its import is not worth the time
    if hasattr(ipython and ipython.get_ipython(), "kernel"):
        try:
            import ipywidgets  # noqa: F401  # of which tqdm's bar is made
            from IPython.display import display
            from tqdm.notebook import tqdm
        except ImportError:
            return None, None
        bar = tqdm(display=False, **how)
        return bar, display(bar.container, display_id=True)
    if sys.stderr is None or not sys.stderr.isatty():
        return None, None
    from tqdm import tqdm

    return tqdm(**how), None
