"""One thread that trains and draws, so that a slider's callback never has to."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_FRAME_SECONDS = 0.05  # between two pictures, or twice as long as drawing one takes, so that most time is for training
_DONE = object()
_OPEN: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End the threads before Python does: one that is killed inside torch takes the process down with it."""
    for worker in list(_OPEN):
        worker.close()


class Worker:
    """A daemon thread that owns models, generators and figures; everybody else only posts wishes, and returns at once.

    Of many requests the newest wins and the others never start, so nothing queues; the run under way is dropped after
    the step that it is in.

    Args:
        start: called in the thread with the newest request's params; returns an iterator that makes one step a `next`.
        draw: called in the thread to show what there is: after the first step, then up to 20 times a second, and at
            the end; never before a first step, so a run that is paused at once makes that step.
        changed: called in the thread whenever `state` may have changed, after `draw`.

    Attributes:
        state: "idle" (nothing to do), "running", "paused", "stopped" or "failed".
        generation: the number of requests so far. drawn: the generation that the last picture is of.
        error: the exception that ended the last run, or None.
    """

    def __init__(
        self, start: Callable[..., Iterator[Any]], draw: Callable[[], None], changed: Callable[[], None] = lambda: None
    ) -> None:
        self._start, self._draw, self._changed = start, draw, changed
        self.state, self.generation, self.drawn = "idle", 0, 0
        self._begun = 0  # the generation that the last step was of
        self.error: Exception | None = None
        self._params: Mapping[str, Any] = {}
        self._redraw = self._step_once = self._closed = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="mbkit explorer", daemon=True)
        self._thread.start()
        _OPEN.add(self)

    def request(self, params: Mapping[str, Any], paused: bool = False) -> None:
        """Begin anew with `params`, and make the first step only if `paused`; the run under way is dropped."""
        with self._condition:
            self._params = params
            self.generation += 1
            self.state, self.error, self._step_once = "paused" if paused else "running", None, False
            self._condition.notify_all()

    def redraw(self) -> None:
        """Draw again without training."""
        self._tell(_redraw=True)

    def pause(self, paused: bool) -> None:
        """Hold the run under way after its present step, or let it go on."""
        now, then = ("running", "paused") if paused else ("paused", "running")
        if self.state == now:
            self._tell(state=then, _redraw=True)

    def step(self) -> None:
        """Make one step of a paused run; pause one that is running."""
        if self.state in ("running", "paused"):
            self._tell(state="paused", _step_once=True)

    def stop(self) -> None:
        """Give up the run under way; the last picture stays."""
        if self.state in ("running", "paused"):
            self._tell(state="stopped", _redraw=True)

    def close(self) -> None:
        """End the thread, after the step that it is in."""
        self._tell(_closed=True, state="stopped")
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do or to draw, a paused run included; return False if time ran out first.

        Raises:
            Exception: the one that ended the last run.
        """
        with self._condition:
            done = self._condition.wait_for(lambda: self._closed or not self._busy(), timeout)
            if self.error is not None:
                raise self.error
            return done

    def _tell(self, **wishes: Any) -> None:
        with self._condition:
            for name, value in wishes.items():
                setattr(self, name, value)
            self._condition.notify_all()

    def _busy(self) -> bool:
        return self._advances() or self._redraw or self._working

    def _advances(self) -> bool:
        first = self.state == "paused" and self._begun != self.generation
        return self.state == "running" or first or self._step_once

    _working = False  # between taking a wish and having shown what came of it

    def _loop(self) -> None:
        steps: Iterator[Any] = iter(())
        frame, pause, news = 0.0, _FRAME_SECONDS, False
        while True:
            with self._condition:
                self._working = False
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._closed or self._busy())
                if self._closed:
                    return
                self._working = True
                generation, redraw, single = self.generation, self._redraw, self._step_once
                advance = self._advances()
                self._redraw = self._step_once = False
                params = self._params
            over, error = False, None
            try:
                if advance:
                    if self._begun != generation:
                        self._begun = generation
                        steps = self._start(**params)
                    over = next(steps, _DONE) is _DONE
                    news = news or not over
                if self.generation != generation:
                    continue  # nobody waits for this picture any more
                due = single or over or self.drawn != generation or time.perf_counter() - frame > pause
                if (news and (due or redraw)) or (redraw and self.drawn and self.state != "failed"):
                    self.drawn, begun = self._begun, time.perf_counter()
                    self._draw()
                    frame, news = time.perf_counter(), False
                    pause = max(_FRAME_SECONDS, 2 * (frame - begun))
            except Exception as problem:  # shown by whoever listens, raised by wait()
                error, steps = problem, iter(())
            with self._condition:
                if generation == self.generation:
                    if error is not None:
                        self.state, self.error = "failed", error
                    elif over and self.state in ("running", "paused"):
                        self.state = "idle"
            self._changed()
