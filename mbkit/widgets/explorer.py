"""What all explorers share: controls, a picture, a line under it, and a thread that trains and draws."""

from __future__ import annotations

import base64
import html
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ipywidgets as ipw
import torch
from IPython.display import Image, display

from ..figures.curves import LearningRates, palette_png
from ..training.batched import Step
from .worker import Worker

__all__ = """OPTIMIZERS WIDE Explorer choice given keywords live_curves log_range on_change slider
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
        """End the thread and take the widget off the page."""
        if self.worker is not None:
            self.worker.close()
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


def given(build: Callable[..., Any] | None, batches: Any) -> str:
    """Return how a line of code passes on both, or neither; a lambda has no name that could be run.

    Raises:
        ValueError: only one of them.
    """
    if (build is None) != (batches is None):
        raise ValueError("Expected both build and batches, or neither for the demo's: got one of them.")
    name = getattr(build, "__name__", "build")
    return "" if build is None else f"{name if name.isidentifier() else 'build'}, batches, "


def keywords(settings: Mapping[str, Any]) -> str:
    """Return settings as keyword arguments in a line of code."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def on_change(controls: Iterable[ipw.Widget], callback: Callable[[], None]) -> None:
    """Call back whenever one of the controls changes its value."""
    for control in controls:
        control.observe(lambda _: callback(), "value")


def slider(name: str, value: int, low: int, high: int) -> ipw.IntSlider:
    return ipw.IntSlider(value, low, high, description=name, style=WIDE)


def choice(name: str, options: Sequence[str], value: str) -> ipw.Dropdown:
    if value not in options:
        raise ValueError(f"Expected {' or '.join(options)} as {name}, got {value!r}.")
    return ipw.Dropdown(options=list(options), value=value, description=name, style=WIDE)


def log_range(name: str, low: float, high: float) -> ipw.SelectionRangeSlider:
    ticks = {float(f"{10 ** (n / 4):.2g}") for n in range(-20, 5)} | {float(low), float(high)}
    options = [(f"{rate:.3g}", rate) for rate in sorted(ticks)]
    wide = ipw.Layout(width="24em")
    return ipw.SelectionRangeSlider(options=options, value=(low, high), description=name, style=WIDE, layout=wide)


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
