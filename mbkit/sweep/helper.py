"""A process of its own for batches that are handed to a thread, as Dask does.

Other threads of a worker, such as those that talk to its scheduler, draw from Python's generator, which is one for all
threads: beside them a batch would not end in the same bits. So each thread keeps one helper process, and waits for it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import spawn
from typing import Any

from .worker import Job, run_batch

try:
    import cloudpickle as pickler  # which takes lambdas, and classes of a script
except ImportError:
    pickler = pickle

__all__ = ["HelperLost", "run_job"]

_own = threading.local()


class HelperLost(RuntimeError):
    """The process that trained a batch has died."""


def run_job(job: Job) -> dict[str, list[float]]:
    """Train a batch: here if this is a process's main thread, else in this thread's helper process."""
    if threading.current_thread() is threading.main_thread():
        return run_batch(job)
    if not hasattr(_own, "helper"):
        _own.helper = _Helper()
    try:
        result = _own.helper.run(job)
    except (EOFError, BrokenPipeError) as error:
        status = _own.helper.process.wait()
        del _own.helper
        raise HelperLost(f"exit status {status}") from error
    if isinstance(result, BaseException):
        raise result
    return result


class _Helper:
    """A process that ends with the thread that keeps it."""

    def __init__(self) -> None:
        code, paths = "from mbkit.sweep.helper import serve; serve()", os.pathsep.join(filter(None, sys.path))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": paths}}
        self.process: Any = subprocess.Popen([sys.executable, "-c", code], **pipes)  # type: ignore[call-overload]
        prepared = spawn.get_preparation_data("sweep")  # by which the script becomes __main__ there too
        prepared.pop("authkey", None)
        pickle.dump(prepared, self.process.stdin)

    def run(self, job: Job) -> Any:
        pickler.dump(job, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)

    def __del__(self) -> None:
        self.process.kill()
        with suppress(OSError):  # a pipe that still holds a job
            self.process.communicate()


def serve() -> None:
    """Train batches until nobody is there to hand them out; what is printed goes to standard error."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    spawn.prepare(pickle.load(sys.stdin.buffer))
    while True:
        try:
            result: Any = run_batch(pickle.load(sys.stdin.buffer))
        except EOFError:
            return
        except Exception as error:
            result = error
        out.write(_pickled(result))
        out.flush()


def _pickled(result: Any) -> bytes:
    try:
        return pickler.dumps(result)
    except Exception:  # an exception that holds what cannot be sent
        return pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}"))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
