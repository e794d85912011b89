"""Batches handed to an executor: lost workers, batches that kill theirs, executors without workers."""

from __future__ import annotations

import concurrent.futures as futures
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from .folder import batch_file
from .helper import HelperLost, run_job
from .worker import Job, run_batch

__all__ = ["WorkersLost", "run_jobs"]

_LOOK_EVERY = 0.5  # seconds from one look at the workers to the next


class WorkersLost(RuntimeError):
    """A batch lost its worker again and again, or no worker was there; what was trained is in the folder."""


def run_jobs(
    jobs: Iterable[Job],
    executor: Any,
    done: Callable[[Job, dict[str, list[float]]], None],
    *,
    max_retries: int,
    no_workers_timeout: float,
    after_epoch: Callable[[Job, int], None],
) -> None:
    """Run batches, by an executor or in this process; exceptions are raised once the other batches are done.

    Args:
        executor: None, an executor, a callable that makes one (and a new one for one that broke), or a Dask Client.
        done: called with each batch and its scores.
        max_retries: how many times in a row a batch may lose its worker without coming further.
        no_workers_timeout: seconds after which a Dask cluster without workers is given up.
        after_epoch: called after each epoch of a batch in this process.

    Raises:
        WorkersLost: a batch was given up, the executor is broken or gone, or has no workers.
        Exception: whatever a batch raised that is no lost worker; an OSError, such as a full disk, at once.
    """
    errors: list[BaseException] = []
    if executor is None:
        for job in jobs:
            try:
                done(job, run_batch(job, lambda epoch, job=job: after_epoch(job, epoch)))
            except OSError:
                raise
            except Exception as error:
                errors.append(_named(error, job))
    else:
        _Crew(executor, done, errors, max_retries, no_workers_timeout).run(deque(jobs))
    if errors:
        if len(errors) > 1 and hasattr(errors[0], "add_note"):
            errors[0].add_note(f"{len(errors) - 1} other batches raised an exception too.")
        raise errors[0]


class _Crew:
    def __init__(self, executor: Any, done: Any, errors: list[Any], max_retries: int, timeout: float) -> None:
        self.done, self.errors, self.max_retries, self.timeout = done, errors, max_retries, timeout
        executor = executor.get_executor(pure=False) if hasattr(executor, "get_executor") else executor
        self._make = None if hasattr(executor, "submit") else executor
        self._executor = self._make() if self._make else executor
        self._client = getattr(self._executor, "_client", None)  # of Dask's executor, which does not tell its workers
        self._running: dict[futures.Future, Job] = {}
        self._losses: dict[int, tuple[Any, int]] = {}  # by batch: how far it was, and how often it has been lost there
        self._last_seen = time.monotonic()

    def run(self, waiting: deque[Job]) -> None:
        """Run all batches.

        A pool that breaks loses all its batches. They run one by one then, so that the one that kills its worker is
        known. With Dask nothing breaks, and it says which batch a worker had.
        """
        suspects: deque[Job] = deque()
        try:
            while waiting or suspects or self._running:
                self._hand_out(waiting, suspects)
                over, _ = futures.wait(self._running, _LOOK_EVERY, futures.FIRST_COMPLETED)
                self._look_for_workers()
                if any(
                    isinstance(future.exception(), futures.BrokenExecutor) for future in over if not future.cancelled()
                ):
                    over, _ = futures.wait(self._running)
                    self._renew(next(iter(over)))
                lost = [(self._running[future], error) for future in over if (error := self._close(future))]
                for job, error in lost:
                    broken = isinstance(error, futures.BrokenExecutor)
                    alone = len(lost) == len(self._running) == 1
                    deaths = int(alone) if broken else 1 + getattr(error, "allowed_failures", 0)
                    (suspects if broken else waiting).extend(self._again(job, error, deaths))
                for future in over:
                    del self._running[future]
        finally:
            for future in self._running:
                future.cancel()
            if self._make:
                self._executor.shutdown(wait=not self._running, cancel_futures=True)

    def _hand_out(self, waiting: deque[Job], suspects: deque[Job]) -> None:
        """Submit what may run now: one suspect alone, or as many batches as a pool has workers for, and one more."""
        if suspects and not self._running:
            self._submit(suspects.popleft())
            return
        most = getattr(self._executor, "_max_workers", None)
        alone = suspects or any(job.attempt for job in self._running.values())
        while waiting and not (alone and self._client is None) and (most is None or len(self._running) <= most):
            self._submit(waiting.popleft())

    def _submit(self, job: Job) -> None:
        self._running[self._executor.submit(run_job, job)] = job

    def _close(self, future: futures.Future) -> BaseException | None:
        """Take a batch's result; return the exception if that says that its worker was lost."""
        job = self._running[future]
        try:
            self.done(job, future.result())
        except futures.CancelledError as error:
            raise WorkersLost(
                "The executor has cancelled the batches (its scheduler is gone, or it was shut down): call sweep again "
                "with another; it goes on where this one ended."
            ) from error
        except OSError:
            raise
        except Exception as error:
            if isinstance(error, (futures.BrokenExecutor, HelperLost)) or type(error).__name__ == "KilledWorker":
                return error
            self.errors.append(_named(error, job))
        return None

    def _again(self, job: Job, error: BaseException, losses: int) -> list[Job]:
        """Return the batch to run it again, or give it up by name."""
        part = batch_file(job.task.folder, job.rung, job.number, "part.")
        stamp = part.stat().st_mtime_ns if part.exists() else None
        known, before = self._losses.get(job.number, (stamp, 0))
        losses += before if known == stamp else 0
        self._losses[job.number] = stamp, losses
        if losses <= self.max_retries:
            return [replace(job, attempt=job.attempt + 1)]
        lost = WorkersLost(
            f"The worker of {job} died {losses} times in a row ({error or type(error).__name__}): the batch is given "
            "up. Look whether it needs more memory than a worker has, and call sweep again."
        )
        lost.__cause__ = error
        self.errors.append(lost)
        return []

    def _renew(self, future: futures.Future) -> None:
        """Make a new executor in place of one that broke."""
        if self._make is None:
            raise WorkersLost(
                "A worker died, and its pool is broken: call sweep again with a new executor, and it goes on where "
                "this one ended; or pass a function that makes an executor, which is called again then."
            ) from future.exception()
        self._executor.shutdown(wait=False)
        self._executor = self._make()

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


def _named(error: BaseException, job: Job) -> BaseException:
    if hasattr(error, "add_note"):
        error.add_note(f"This was {job}.")
    return error
