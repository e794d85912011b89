"""Batches handed to an executor: lost workers, batches that kill theirs, executors without workers."""

from __future__ import annotations

import concurrent.futures as futures
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..common.process import ProcessEnded, Worker
from .folder import batch_file
from .worker import Job, run_batch

__all__ = ["WorkersLost", "run_job", "run_jobs"]

_LOOK_EVERY = 0.5  # seconds from one look at the workers to the next
_own = threading.local()


class WorkersLost(RuntimeError):
    """A batch lost its worker again and again, or no worker was there; what was trained is in the folder."""


def run_jobs(
    jobs: Sequence[Job],
    executor: Any,
    done: Callable[[Job, dict[str, list[float]]], None],
    *,
    max_retries: int,
    no_workers_timeout: float,
) -> None:
    """Run batches, by an executor or in this process; exceptions are raised once the other batches are done.

    Args:
        executor: None, an executor, or a Dask Client.
        done: called with each batch and its scores.
        max_retries: how many times in a row a batch may lose its worker without coming further.
        no_workers_timeout: seconds after which a Dask cluster without workers is given up.

    Raises:
        WorkersLost: a batch was given up, the executor is broken or gone, or has no workers.
        Exception: whatever a batch raised that is no lost worker; an OSError, such as a full disk, at once.
    """
    executor = executor.get_executor(pure=False) if hasattr(executor, "get_executor") else executor
    crew = _Crew(executor or _Here(), done, max_retries, no_workers_timeout)
    crew.run(jobs)
    if crew.errors:
        if len(crew.errors) > 1 and hasattr(crew.errors[0], "add_note"):
            crew.errors[0].add_note(f"{len(crew.errors) - 1} other batches raised an exception too.")
        raise crew.errors[0]


class _Trained:
    def __init__(self, job: Job) -> None:
        self._result = run_batch(job)

    def result(self) -> dict[str, list[float]]:
        return self._result


def run_job(job: Job) -> dict[str, list[float]]:
    """Train a batch: here if this is a process's main thread, else in a process of this thread's own.

    Other threads of a worker, such as those that talk to Dask's scheduler, draw from Python's generator, which is one
    for all threads: beside them a batch would not end in the same bits.
    """
    if threading.current_thread() is threading.main_thread():
        return run_batch(job)
    if not hasattr(_own, "worker") or _own.worker.ended:
        _own.worker = Worker(script=True)
    _own.worker.ask(_Trained, job)
    return _own.worker.ask("result")


class _Here(futures.Executor):
    """Runs a batch when it is submitted, in this process."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future:
        future: futures.Future = futures.Future()
        try:
            future.set_result(run_batch(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class _Crew:
    def __init__(self, executor: futures.Executor, done: Any, max_retries: int, timeout: float) -> None:
        self.executor, self.done, self.max_retries, self.timeout = executor, done, max_retries, timeout
        self.errors: list[BaseException] = []
        self._client = getattr(executor, "_client", None)  # of Dask's executor, which does not tell its workers
        self._running: dict[futures.Future, Job] = {}
        self._losses: dict[int, tuple[Any, int]] = {}  # by batch: how far it was, and how often it has been lost there
        self._last_seen = time.monotonic()

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all batches; in this process one after the other."""
        try:
            for job in jobs:
                self._submit(job)
            while self._running:
                over, _ = futures.wait(self._running, _LOOK_EVERY, futures.FIRST_COMPLETED)
                self._look_for_workers()
                for future in over:
                    self._close(future)
        finally:
            for future in self._running:
                future.cancel()

    def _submit(self, job: Job) -> None:
        future = self.executor.submit(run_job, job)
        self._running[future] = job
        if isinstance(self.executor, _Here):
            self._close(future)

    def _close(self, future: futures.Future) -> None:
        """Take a batch's result, or run it again where its worker was lost."""
        job = self._running.pop(future)
        try:
            self.done(job, future.result())
        except (futures.CancelledError, futures.BrokenExecutor) as error:
            raise WorkersLost(
                "The executor has given up the batches (a pool breaks when a worker dies; or it was shut down, or its "
                "scheduler is gone): call sweep again with another, and it goes on where this one ended."
            ) from error
        except OSError:
            raise
        except Exception as error:
            if isinstance(error, ProcessEnded) or type(error).__name__ == "KilledWorker":
                self._again(job, error, 1 + getattr(error, "allowed_failures", 0))
                return
            if hasattr(error, "add_note"):
                error.add_note(f"This was {job}.")
            self.errors.append(error)

    def _again(self, job: Job, error: BaseException, losses: int) -> None:
        """Run a batch again, or give it up by name."""
        part = batch_file(job.task.folder, job.rung, job.number, "part.")
        stamp = part.stat().st_mtime_ns if part.exists() else None
        known, before = self._losses.get(job.number, (stamp, 0))
        losses += before if known == stamp else 0
        self._losses[job.number] = stamp, losses
        if losses <= self.max_retries:
            self._submit(replace(job, attempt=job.attempt + 1))
            return
        lost = WorkersLost(
            f"The worker of {job} died {losses} times in a row ({error or type(error).__name__}): the batch is given "
            "up. Look whether it needs more memory than a worker has, and call sweep again."
        )
        lost.__cause__ = error
        self.errors.append(lost)

    def _look_for_workers(self) -> None:
        if self._client is None:
            return
        try:
            if self._client.nthreads():
                self._last_seen = time.monotonic()
        except Exception as error:
            raise WorkersLost(
                f"Dask's scheduler does not answer ({error or type(error).__name__}): start another, and call sweep "
                "again; it goes on where this one ended."
            ) from error
        if time.monotonic() - self._last_seen > self.timeout:
            raise WorkersLost(
                f"No worker has been there for {self.timeout:g} s: start some, and call sweep again, which goes on "
                "where this one ended."
            )
