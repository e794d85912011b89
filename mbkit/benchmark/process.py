"""A process of its own for each side of a benchmark: nobody gains or loses by what another one has set up."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..common.machine import tune_malloc

__all__ = ["Worker", "serve"]


class Worker(contextlib.AbstractContextManager):
    """A process that keeps one object, and waits, without using a core, until it is asked to call a method of it.

    Args:
        threads: of torch.
        malloc: whether malloc keeps what is freed (`machine.tune_malloc`), as it does where mbkit trains.

    Example:
        >>> with Worker(threads=1) as worker:
        ...     worker.ask(list, "abca")
        ...     worker.ask("count", "a")
        2
    """

    def __init__(self, threads: int, malloc: bool = True) -> None:
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", f"from {__name__} import serve; serve({threads}, {malloc})"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # In a session of its own: Ctrl-C ends this process, whose end is the end of that one.
        self._process = subprocess.Popen(command, env=os.environ | paths, start_new_session=True, **pipes)

    def ask(self, what: Callable | str, *args: Any, patience: float | None = None) -> Any:
        """Have the object made by `what(*args)`, or return what its method of that name returns; all is pickled.

        Raises:
            RuntimeError: it raised an error, or the process has ended; after `patience` seconds it is ended.
        """
        self.send(what, *args)
        return self.receive(patience)

    def send(self, what: Callable | str, *args: Any) -> None:
        """Ask without waiting; `receive` returns the answer."""
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((what, args), self._process.stdin)
            self._process.stdin.flush()

    def receive(self, patience: float | None = None) -> Any:
        """Wait for an answer."""
        clock = threading.Timer(patience or threading.TIMEOUT_MAX, self._process.kill)
        clock.start()
        try:
            done, answer = pickle.load(self._process.stdout)
        except EOFError:
            limit = f", or it took longer than {patience:.0f} s" if patience else ""
            raise RuntimeError(f"The process ended ({self._process.wait()}){limit}.") from None
        finally:
            clock.cancel()
        if not done:
            raise RuntimeError(answer)
        return answer

    @property
    def ended(self) -> bool:
        """Whether there is nobody to ask any more."""
        return self._process.poll() is not None

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()  # closes the pipes, which ends the processes that this one has started


def serve(threads: int, malloc: bool) -> None:
    """Answer a `Worker`'s questions on standard input until it ends; what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    if malloc:
        tune_malloc()
    kept = None
    with contextlib.suppress(EOFError):
        while True:
            what, args = pickle.load(sys.stdin.buffer)
            try:
                if isinstance(what, str):
                    answer = True, getattr(kept, what)(*args)
                else:
                    kept = None  # before the next one takes its memory
                    gc.collect()
                    kept = what(*args)
                    answer = True, None
            except Exception as error:
                answer = False, str(error) or type(error).__name__
            if not answer[0]:
                kept = None
                gc.collect()
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
            pickle.dump(answer, answers)
            answers.flush()
