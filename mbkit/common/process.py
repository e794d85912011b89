"""A process of its own: what is set, drawn or broken in it stays in it."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any

import torch

try:
    import cloudpickle as pickler  # which takes lambdas, and classes of a script
except ImportError:
    pickler = pickle


class ProcessEnded(RuntimeError):
    """A process has ended before it answered."""


class Worker(contextlib.AbstractContextManager):
    """A process that keeps one object, and waits, without using a core, until it is asked to call a method of it.

    Args:
        script: whether functions and classes of the running script are found there; it then needs a `__main__` guard.

    Example:
        >>> with Worker() as worker:
        ...     worker.ask(list, "abca")
        ...     worker.ask("count", "a")
        2
    """

    def __init__(self, script: bool = False) -> None:
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # In a session of its own: Ctrl-C ends this process, whose end is the end of that one.
        self._process: Any = subprocess.Popen(command, env=os.environ | paths, start_new_session=True, **pipes)
        prepared = spawn.get_preparation_data("worker") if script else {}
        prepared.pop("authkey", None)
        pickle.dump(prepared, self._process.stdin)

    def ask(self, what: Callable | str, *args: Any, patience: float | None = None) -> Any:
        """Have the object made by `what(*args)`, or return what its method of that name returns; all is pickled.

        Raises:
            ProcessEnded: there is no answer any more; after `patience` seconds the process is ended.
            Exception: what was raised there; the object is given up then.
        """
        self.send(what, *args)
        return self.receive(patience)

    def send(self, what: Callable | str, *args: Any) -> None:
        """Ask without waiting; `receive` returns the answer."""
        with contextlib.suppress(BrokenPipeError):
            pickler.dump((what, args), self._process.stdin)
            self._process.stdin.flush()

    def receive(self, patience: float | None = None) -> Any:
        """Wait for an answer."""
        clock = threading.Timer(patience or threading.TIMEOUT_MAX, self._process.kill)
        clock.start()
        try:
            done, answer = pickle.load(self._process.stdout)
        except EOFError:
            limit = f", or it took longer than {patience:.0f} s" if patience else ""
            raise ProcessEnded(f"exit status {self._process.wait()}{limit}") from None
        finally:
            clock.cancel()
        if not done:
            raise answer
        return answer

    @property
    def ended(self) -> bool:
        """Whether there is nobody to ask any more."""
        return self._process.poll() is not None

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):  # a pipe that still holds a question
            self._process.communicate()  # closes the pipes

    def __del__(self) -> None:
        self.__exit__()


def serve() -> None:
    """Answer a `Worker`'s questions on standard input until it ends; what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    spawn.prepare(pickle.load(sys.stdin.buffer))
    kept = None
    while True:
        try:
            what, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if isinstance(what, str):
                answer = _pickled(True, getattr(kept, what)(*args))
            else:
                kept = None  # before the next one takes its memory
                gc.collect()
                kept = what(*args)
                answer = _pickled(True, None)
        except Exception as error:
            answer, kept = _pickled(False, error), None
        if kept is None:
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        answers.write(answer)
        answers.flush()


def _pickled(done: bool, answer: Any) -> bytes:
    try:
        return pickler.dumps((done, answer))
    except Exception:  # an exception that holds what cannot be sent
        return pickle.dumps((False, RuntimeError(f"{type(answer).__name__}: {answer}")))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
