"""What all explorers share: controls, a picture, a line under it, and a thread that trains and draws."""

from __future__ import annotations

import base64
import html
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ipywidgets as ipw
import torch
from IPython.display import Image, display

from ..common.checks import whole_number
from ..figures.curves import LearningRates, palette_png
from ..training.batched import Step
from .worker import Worker

__all__ = """OPTIMIZERS WIDE Explorer check_range choice keywords live_curves log_range on_change slider
    spread""".split()

_STYLE = "<style>.mbkit-outdated { opacity: 0.35; } .mbkit-status code { user-select: all; }</style>"
WIDE = {"description_width": "7.5em"}
OPTIMIZERS = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam")


class Explorer(ipw.VBox):
    """Controls, a picture, and a line that says what it shows; a subclass says how to train and how to draw.

    A subclass gives `settings`, what its controls say, `_start(**settings)`, an iterator of training steps,
    `_picture()`, a PNG, `_facts()`, what the status line says once there is a picture, and `call`, the code that
    reproduces it. Buttons to pause, step, reset and stop come by themselves.

    Attributes:
        worker: the thread, with `state`, `generation` and `error`. image: the picture. status: the line under it.
        pause, step_button, reset_button, stop_button: what a hand would press.
    """

    worker: Any = None  # a widget is closed when it is collected, also one that was never finished

    def __init__(self, controls: Sequence[Sequence[ipw.Widget]], height: int) -> None:
        size = {"width": "860px", "height": f"{height}px"}  # or the page jumps when the first picture comes
        self.image = ipw.Image(format="png", layout=ipw.Layout(**size))
        self.status = ipw.HTML()
        self.pause = ipw.ToggleButton(description="Pause", icon="pause")
        buttons = {name: ipw.Button(description=name.capitalize()) for name in ("step", "reset", "stop")}
        self.step_button, self.reset_button, self.stop_button = buttons.values()
        self.pause.observe(lambda change: self.worker.pause(change["new"]), "value")
        self.step_button.on_click(lambda _: self._step())
        self.reset_button.on_click(lambda _: self.request())
        self.stop_button.on_click(lambda _: self.worker.stop())
        rows = [*controls, (self.pause, *buttons.values())]
        rows = [ipw.HBox(list(row), layout=ipw.Layout(flex_flow="row wrap")) for row in rows]
        self.worker, self._dimming = Worker(self._start, self._show, self._say), threading.Lock()
        super().__init__([ipw.HTML(_STYLE), *rows, self.image, self.status])

    def request(self, **params: Any) -> None:
        """Train anew, with the last params where none are given; what is seen meanwhile is dimmed."""
        self.pause.value = False
        with self._dimming:
            self.worker.request(**params)
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

    @property
    def png(self) -> bytes:
        """The picture as a small PNG."""
        return palette_png(self.image.value)

    def _changed(self) -> None:
        self.request(**self.settings)

    def _step(self) -> None:
        self.worker.step()
        self.pause.value = True

    def _show(self) -> None:
        self.image.value = self._picture()
        with self._dimming:
            if self.worker.drawn == self.worker.generation:
                self.image.remove_class("mbkit-outdated")

    def _say(self) -> None:
        worker = self.worker
        facts = self._facts() if worker.drawn else {}
        data = {"state": worker.state, "generation": worker.generation, "drawn": worker.drawn, **facts}
        attributes = " ".join(f'data-{name}="{html.escape(str(value))}"' for name, value in data.items())
        said = ", ".join(f"{name.replace('-', ' ')}: {value}" for name, value in facts.items())
        if worker.error is not None:
            said = f"<b>{type(worker.error).__name__}</b>: {html.escape(str(worker.error))}"
        text = f"<b>{worker.state}</b> · {said}<br>The same in a line of code: <code>{html.escape(self.call)}</code>"
        self.status.value = f'<div class="mbkit-status" {attributes}>{text}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Add a picture for pages where no kernel runs; it is worth a wait, and shows what training ends with."""
        self.worker.wait(timeout=30)
        bundle = super()._repr_mimebundle_(**kwargs)
        if self.image.value:
            bundle["image/png"] = base64.b64encode(self.png).decode()
        return bundle


def _parts(widget: ipw.Widget) -> Iterator[ipw.Widget]:
    """Yield all widgets that belong to one: its children, with theirs, and what describes their look."""
    for part in (*getattr(widget, "children", ()), widget.layout, getattr(widget, "style", None)):
        if isinstance(part, ipw.DOMWidget):
            yield from _parts(part)
        if isinstance(part, ipw.Widget):
            yield part


def keywords(settings: Mapping[str, Any]) -> str:
    """Return settings as keyword arguments in a line of code."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def on_change(controls: Iterable[ipw.Widget], callback: Callable[[], None]) -> None:
    """Call back whenever one of the controls changes its value."""
    for control in controls:
        control.observe(lambda _: callback(), "value")


def slider(name: str, value: int, low: int, high: int, shown: str = "") -> ipw.IntSlider:
    """Return a slider; where it stands outside its ends it would move there without a word, so that is refused."""
    if not low <= whole_number(value, name, low) <= high:
        raise ValueError(f"Expected {name} from {low} to {high}, got {value}.")
    return ipw.IntSlider(value, low, high, description=shown or name, style=WIDE)


def choice(name: str, options: Sequence[str], value: str) -> ipw.Dropdown:
    if value not in options:
        raise ValueError(f"Expected {' or '.join(options)} as {name}, got {value!r}.")
    return ipw.Dropdown(options=list(options), value=value, description=name, style=WIDE)


def check_range(name: str, rates: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest rate of a log scale.

    Raises:
        ValueError: not two numbers with 0 < lowest <= highest.
    """
    if len(rates) != 2 or not 0 < rates[0] <= rates[1] < float("inf"):
        raise ValueError(
            f"Expected {name} as the lowest and the highest rate, both above 0, got {', '.join(map(str, rates))}: "
            "pass e.g. (0.001, 1.0)."
        )
    return float(rates[0]), float(rates[1])


def log_range(name: str, low: float, high: float) -> ipw.SelectionRangeSlider:
    low, high = check_range(name, (low, high))
    ticks = {float(f"{10 ** (n / 4):.2g}") for n in range(-20, 5)} | {low, high}
    options = [(f"{rate:.3g}", rate) for rate in sorted(ticks)]
    named = {"description": "learning rates", "style": WIDE, "layout": ipw.Layout(width="24em")}
    return ipw.SelectionRangeSlider(options=options, value=(low, high), **named)


def spread(low: float, high: float, number: int) -> tuple[float, ...]:
    """Return rates from low to high, evenly spaced on a log scale and rounded to three digits."""
    return tuple(float(f"{low * (high / low) ** (n / max(1, number - 1)):.3g}") for n in range(number))


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
