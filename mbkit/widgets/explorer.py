"""What all explorers share: controls, a picture, a line under it, and a thread that trains and draws."""

from __future__ import annotations

import base64
import html
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ipywidgets as ipw
import torch
from IPython import get_ipython
from IPython.display import Image, display

from ..figures.curves import LearningRates, palette_png
from ..training.batched import Step
from .page import WIDTH, page
from .worker import Worker

IDLE = ("step", "reset")  # the buttons that do something where nothing trains


class Explorer(ipw.VBox):
    """Controls, a picture, and a line that says what it shows; a subclass says how to train and how to draw.

    A subclass gives `_start(**settings)`, an iterator of training steps, `_picture()`, a PNG, and `_facts()`, what the
    status line says once there is a picture; and `settings`, where its controls' values are not the keywords of the
    function that opens it.

    Args:
        rows: of controls, by their names; each becomes an attribute of the explorer.
        marks: the names of those that only change what is highlighted; the others train anew.
        given: the first arguments of the line of code, as code.
        height: of the picture, where it is 860 wide.

    Attributes:
        worker: the thread, with `state`, `generation` and `error`. image: the picture. status: the line under it.
        buttons: "pause", "step", "reset" and "stop".
    """

    opens: str  # the name of the function that opens it
    shows: str  # what there is to see, for those who cannot see it
    note = ""  # what a word in the status line means
    worker: Any = None  # a widget is closed when it is collected, also one that was never finished

    def __init__(
        self,
        rows: Sequence[Mapping[str, ipw.Widget]],
        marks: Sequence[str] = (),
        given: Sequence[str] = (),
        height: int = 320,
    ) -> None:
        self._controls, self._marks, self._given = {k: v for row in rows for k, v in row.items()}, marks, given
        for name, control in self._controls.items():
            setattr(self, name, control)
            control.observe(lambda _, name=name: self._changed(name), "value")
        shape = {"width": "100%", "max_width": f"{WIDTH}px", "height": "auto", "flex": "none"}
        self.image = ipw.Image(format="png", layout=ipw.Layout(**shape))
        self.image.add_class(f"mbkit-{height}")
        self.status, click = ipw.HTML(), ipw.Text(continuous_update=False)
        click.add_class("mbkit-click")
        click.observe(lambda click: self.worker.drawn and self._clicked(*map(float, click["new"].split()[:2])), "value")
        self.buttons = {name: ipw.Button(description=name.capitalize()) for name in ("pause", "step", "reset", "stop")}
        self.buttons["pause"].on_click(lambda _: self.worker.pause(self.worker.state == "running"))
        self.buttons["step"].on_click(lambda _: self._step())
        self.buttons["reset"].on_click(lambda _: self.request())
        self.buttons["stop"].on_click(lambda _: self.worker.stop())
        boxes = [ipw.HBox([*row.values()], layout=ipw.Layout(flex_flow="row wrap")) for row in (*rows, self.buttons)]
        self.worker, self._dimming = Worker(self._start, self._show, self._say), threading.Lock()
        super().__init__([page(self.shows, height), *boxes, self.image, click, self.status])
        self.add_class("mbkit-explorer")
        _close_those_of_an_earlier_run(self)
        self.request()

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say, those that mark left out."""
        return {name: each.value for name, each in self._controls.items() if name not in self._marks}

    @property
    def call(self) -> str:
        """The code that reproduces the picture, in a notebook that has imported `widgets` from mbkit."""
        settings = [f"{name}={value!r}" for name, value in (self.settings | self._named()).items()]
        return f"widgets.{self.opens}({', '.join([*self._given, *settings])})"

    def request(self, paused: bool = False) -> None:
        """Train anew what the controls say, one step only if paused; what is seen meanwhile is dimmed."""
        with self._dimming:
            self.worker.request(self.settings, paused)
            self.image.add_class("mbkit-outdated")
        self._say()

    def wait(self, timeout: float | None = 60) -> Explorer:
        """Wait until the picture shows what the controls say; return the explorer, so that a cell can end with it.

        Raises:
            TimeoutError: it did not get there in `timeout` seconds.
            Exception: what went wrong in training.
        """
        if not self.worker.wait(timeout):
            raise TimeoutError(f"Expected the picture within {timeout} s: lower the number of models or steps.")
        return self

    def close(self) -> None:
        """End the thread, take the widget off the page, and let go of models and pictures."""
        if self.worker is not None:
            self.worker.close()
            for part in _parts(self):  # ipywidgets keeps every widget that is not closed, and with it who listens to it
                part.unobserve_all()
                part.close()
        super().close()

    def _named(self) -> dict[str, Any]:
        """What else the line of code says: settings without a control, and what is marked."""
        return {}

    def _changed(self, name: str) -> None:
        if name in self._marks:
            self.worker.redraw()
        else:
            self.request()

    def _clicked(self, across: float, down: float) -> None:
        """React to a click on the picture, at these parts of its width and height."""

    def _step(self) -> None:
        if self.worker.state in ("running", "paused"):
            self.worker.step()
        else:
            self.request(paused=True)

    def _show(self) -> None:
        self.image.value = self._picture()
        with self._dimming:
            if self.worker.drawn == self.worker.generation:
                self.image.remove_class("mbkit-outdated")

    def _say(self) -> None:
        worker, state = self.worker, self.worker.state
        for name, button in self.buttons.items():
            button.disabled = state not in ("running", "paused") and name not in IDLE
        self.buttons["pause"].description = "Go on" if state == "paused" else "Pause"
        facts = self._facts() if worker.drawn else {}
        data = {"state": state, "generation": worker.generation, "drawn": worker.drawn, **facts}
        attributes = " ".join(f'data-{name}="{html.escape(str(value))}"' for name, value in data.items())
        said = [f"{name.replace('-', ' ')}: {str(value).removesuffix('.')}" for name, value in facts.items()]
        said = html.escape(", ".join(said))
        if worker.error is not None:
            said = f"<b>{type(worker.error).__name__}</b>: {html.escape(str(worker.error))}"
        dead = '<b class="mbkit-dead">the kernel has ended, run the cell again</b>'
        lines = [f'<b class="mbkit-state">{state}</b>{dead} · {said}', html.escape(self.note)]
        lines.append(f"The same in a line of code: <code>{html.escape(self.call)}</code>")
        self.status.value = f'<div class="mbkit-status" {attributes}>{"<br>".join(filter(None, lines))}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Add a picture for pages where no kernel runs; it is worth a wait, and shows what training ends with."""
        self.worker.wait(timeout=30)
        bundle = super()._repr_mimebundle_(**kwargs)
        if self.image.value:
            bundle["image/png"] = base64.b64encode(palette_png(self.image.value)).decode()
        return bundle


# Which of the notebook's cells has made an explorer, and which run of it; None where there is no notebook.
_OPEN: weakref.WeakKeyDictionary[Explorer, tuple[str | None, str | None]] = weakref.WeakKeyDictionary()


def _close_those_of_an_earlier_run(explorer: Explorer) -> None:
    """Close the explorers that the same cell has made when it ran before: nobody sees them train any more."""
    request = getattr(get_ipython(), "get_parent", dict)()
    cell, run = request.get("metadata", {}).get("cellId"), request.get("header", {}).get("msg_id")
    for other, (its_cell, its_run) in list(_OPEN.items()):
        if cell is not None and its_cell == cell and its_run != run:
            other.close()
            del _OPEN[other]
    _OPEN[explorer] = cell, run


def _parts(widget: ipw.Widget) -> Iterator[ipw.Widget]:
    """Yield all widgets that belong to one: its children, with theirs, and what describes their look."""
    for part in (*getattr(widget, "children", ()), widget.layout, getattr(widget, "style", None)):
        if isinstance(part, ipw.DOMWidget):
            yield from _parts(part)
        if isinstance(part, ipw.Widget):
            yield part


def live_curves(rates: Sequence[float], steps: int) -> Callable[[Step], None]:
    """Return a callback for `fit` that draws every model's loss in the cell's output while the cell trains.

    Args:
        rates: M learning rates, which color the curves.
        steps: how many updates will be made.
    """
    curves, losses, drawn = LearningRates(rates, steps), [], 0.0
    shown = display(display_id=True)

    def show(step: Step) -> None:
        nonlocal drawn
        losses.append(step.losses.cpu())
        if time.perf_counter() - drawn > 0.2 or len(losses) == steps:
            curves.update(torch.stack(losses))
            shown.update(Image(palette_png(curves.frame())))
            drawn = time.perf_counter()

    return show
