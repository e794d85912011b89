"""Keeping what a run has done, whatever ends it: the last step, a callback, Ctrl-C or an exception."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..common.progress import Progress
from .history import History, Step
from .loop import goes_on


class _AtOnce(KeyboardInterrupt):
    """Ctrl-C for the second time, or in the middle of an update: it does not wait, and is not swallowed."""


@contextmanager
def whole_update() -> Iterator[None]:
    """Say of a KeyboardInterrupt in a `with` block around an update that the models may be left half updated."""
    try:
        yield
    except KeyboardInterrupt as error:
        told = "The training was ended in the middle of an update, so the models may be half updated"
        raise _AtOnce(f"{told}: go on from a checkpoint (see fit's), or build the models again.") from error


class Recording:
    """A `with` block around a training loop; when it is left, `history` holds the steps so far.

    Ctrl-C or SIGTERM inside the block waits for the step under way, so that no model is left half updated; the block
    then ends as if the training were done, with `history.interrupted` set, were it in the last moment. The second one
    does not wait: it raises KeyboardInterrupt. An exception goes on its way with the History as its attribute
    `history`.

    Args:
        num_models: M. total: number of steps to come, or None, for the progress bar.
        alone: False where each Step is one of all models, True where each is one of the model it names.
        steps: those made before, when a run goes on. seconds: how long they took.

    Attributes:
        interrupted: whether Ctrl-C was pressed.
    """

    history: History

    def __init__(
        self,
        num_models: int,
        total: int | None,
        *,
        alone: bool = False,
        progress: bool = True,
        steps: Sequence[Step] = (),
        seconds: float = 0.0,
    ):
        self._alone = alone
        self._width = 1 if alone else num_models
        self._columns: list[list[Step]] = [[] for _ in range(num_models if alone else 1)]
        self._columns[0] += steps
        self._bar = Progress(total, "training", progress)
        self._bar.advance(steps=len(steps))
        self._handlers: dict[int, Any] = {}
        self._start = time.perf_counter() - seconds
        self.interrupted = False

    @property
    def steps(self) -> list[Step]:
        """The Steps of all models together, so far."""
        return self._columns[0]

    @property
    def seconds(self) -> float:
        """How long the run has taken."""
        return time.perf_counter() - self._start

    def keep(self, step: Step, callback: Callable[[Step], bool | None] | None = None) -> bool:
        """Keep a step, show it to the callback, and say whether to go on."""
        self._columns[step.model or 0].append(step)
        self._bar.advance(lambda: f"median loss {step.losses.nanmedian().item():.4g}")
        go_on = callback is None or goes_on(callback(step))
        return go_on and not self.interrupted

    def __enter__(self) -> Recording:
        # Only the main thread gets signals, and a handler that the user has set stays.
        if threading.current_thread() is threading.main_thread():
            for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) is usual:
                    self._handlers[number] = signal.signal(number, self._press)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> bool:
        try:
            self._bar.close()
            # A second press ends all at once; only a first one, or one from the data, has left whole models.
            swallowed = isinstance(error, KeyboardInterrupt) and not isinstance(error, _AtOnce)
            self.interrupted |= swallowed
            self.history = self._history()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        self.history.interrupted = self.interrupted  # were it while the History was put together
        if error is not None and not swallowed:
            error.history = self.history  # type: ignore[attr-defined]
        return swallowed

    def _press(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise _AtOnce("Ctrl-C was pressed twice.")
        self.interrupted = True

    def _history(self) -> History:
        columns, alone = self._columns, self._alone
        known = any(columns) and all(s.accuracy is not None for column in columns for s in column)
        clocks = _table([[torch.tensor([s.seconds], dtype=torch.float64) for s in column] for column in columns], 1)
        done = [len(column) for column in columns for _ in range(self._width)]
        last = done if alone else _last_updates(columns[0], self._width)
        return History(
            loss=_table([[s.losses for s in column] for column in columns], self._width),
            accuracy=_table([[s.accuracy for s in column] for column in columns], self._width) if known else None,
            seconds=self.seconds,
            step_seconds=clocks if alone else clocks[:, 0],
            epoch=torch.tensor([s.epoch for s in max(columns, key=len)], dtype=torch.int64),
            steps_done=last,
            interrupted=self.interrupted,
            frozen=[None if a == b else a for a, b in zip(last, done, strict=True)] if last != done else [],
            how=columns[0][-1].how if columns[0] else "",
        )


def _last_updates(steps: Sequence[Step], num_models: int) -> list[int]:
    """Return for each model how many steps there are up to its last update."""
    last = torch.zeros(num_models, dtype=torch.int64)
    for i, step in enumerate(steps, 1):
        last = torch.full_like(last, i) if step.frozen is None else torch.where(step.frozen.cpu(), last, i)
    return last.tolist()


def _table(columns: Sequence[Sequence[Tensor]], width: int) -> Tensor:
    """Lay columns of [width] tensors side by side, [steps, columns * width], NaN where a column is shorter."""
    stacked = [torch.stack(list(column)).cpu() if column else torch.empty(0, width) for column in columns]
    return pad_sequence(stacked, padding_value=math.nan).flatten(1)
