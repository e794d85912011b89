"""Batches handed to an executor: lost workers, batches that kill theirs, executors without workers."""

from __future__ import annotations

import concurrent.futures as futures
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..common.process import ProcessEnded, Worker
from .folder import batch_file
from .worker import Job, run_batch

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
        executor, max_retries, no_workers_timeout: as for `sweep`.
        done: called with each batch and its scores.

    Raises:
        WorkersLost: a batch was given up, the executor is broken or gone, or has no workers.
        Exception: whatever a batch raised that is no lost worker; an OSError, such as a full disk, at once.
    """
    executor = executor.get_executor(pure=False) if hasattr(executor, "get_executor") else executor
    running: dict[futures.Future, Job] = {}
    losses: dict[int, tuple[Any, int]] = {}  # by batch: how far it was, and how often it has been lost there
    errors: list[BaseException] = []

    def close(job: Job, result: Callable[[], dict[str, list[float]]]) -> None:
        """Take a batch's result, or run it again where its worker was lost."""
        try:
            done(job, result())
        except (futures.CancelledError, futures.BrokenExecutor) as error:
            told = "The executor has given up the batches (a pool breaks when a worker dies; or it was shut down)"
            raise WorkersLost(f"{told}: call sweep again with another, and it goes on where this one ended.") from error
        except OSError:
            raise
        except Exception as error:
            if not isinstance(error, ProcessEnded) and type(error).__name__ != "KilledWorker":
                if hasattr(error, "add_note"):
                    error.add_note(f"This was {job}.")
                errors.append(error)
            elif (times := _lost(job, error, losses)) <= max_retries:
                running[executor.submit(run_job, replace(job, attempt=job.attempt + 1))] = job
            else:
                lost = WorkersLost(
                    f"The worker of {job} died {times} times in a row ({error or type(error).__name__}): the batch is "
                    "given up. Look whether it needs more memory than a worker has, and call sweep again."
                )
                lost.__cause__ = error
                errors.append(lost)

    if executor is None:
        for job in jobs:
            close(job, partial(run_batch, job))
    else:
        last_seen = time.monotonic()
        try:
            for job in jobs:
                running[executor.submit(run_job, job)] = job
            while running:
                over, _ = futures.wait(running, _LOOK_EVERY, futures.FIRST_COMPLETED)
                last_seen = _look_for_workers(executor, last_seen, no_workers_timeout)
                for future in over:
                    close(running.pop(future), future.result)
        finally:
            for future in running:
                future.cancel()
    if errors:
        if len(errors) > 1 and hasattr(errors[0], "add_note"):
            errors[0].add_note(f"{len(errors) - 1} other batches raised an exception too.")
        raise errors[0]


def _lost(job: Job, error: BaseException, losses: dict[int, tuple[Any, int]]) -> int:
    """Return how many times in a row a batch has lost its worker without coming further, this time included."""
    part = batch_file(job.task.folder, job.rung, job.number, "part.")
    stamp = part.stat().st_mtime_ns if part.exists() else None
    known, before = losses.get(job.number, (stamp, 0))
    times = 1 + getattr(error, "allowed_failures", 0) + (before if known == stamp else 0)
    losses[job.number] = stamp, times
    return times


def _look_for_workers(executor: Any, last_seen: float, timeout: float) -> float:
    """Return when a worker was there for the last time; who they are, only a client of Dask tells."""
    client = getattr(executor, "_client", None)
    try:
        if client is None or client.nthreads():
            return time.monotonic()
    except Exception as error:
        told = f"Dask's scheduler does not answer ({error or type(error).__name__})"
        raise WorkersLost(f"{told}: start another, and call sweep again; it goes on where this one ended.") from error
    if time.monotonic() - last_seen > timeout:
        told = f"No worker has been there for {timeout:g} s"
        raise WorkersLost(f"{told}: start some, and call sweep again, which goes on where this one ended.")
    return last_seen


def run_job(job: Job) -> dict[str, list[float]]:
    """Train a batch: here if this is a process's main thread, else in a process of this thread's own.

    Other threads of a worker, such as those that talk to Dask's scheduler, draw from Python's generator, which is one
    for all threads: beside them a batch would not end in the same bits.
    """
    if threading.current_thread() is threading.main_thread():
        return run_batch(job)
    if not hasattr(_own, "worker") or _own.worker.ended:
        _own.worker = Worker(script=True)
    _own.worker.ask(run_batch, job)  # the worker keeps the result, a dict
    return _own.worker.ask("copy")
