"""What a worker does: train one batch of trials from one rung to the next, and leave the result in the folder."""

from __future__ import annotations

import inspect
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import ModelBatch
from ..batch.whole_state import load_whole, save_whole
from ..common.files import write_tree
from ..common.random_streams import random_state, seeded, set_random_state
from ..optim import OptimizerFactory
from ..training import PositionedBatches, evaluate, train_steps
from ..training.loop import call, make_schedule, walk
from .configs import Parts
from .folder import batch_file, read_batch, state_file
from .rows import join, join_schedules, pack, take, unpack

__all__ = ["Job", "Task", "build_batch", "own_process", "read_result", "run_batch"]

_DONE, _STATE, _UNDER_WAY = "batch of a sweep", "optimizer of a sweep", "batch under way"
_ONE_AT_A_TIME = threading.Lock()  # torch's generator and number of threads are the process's


@dataclass(frozen=True)
class Task:
    """What all batches of a sweep have in common; the names are those of `sweep`'s arguments."""

    build: Callable[..., nn.Module]
    optimizer_cls: type[torch.optim.Optimizer]
    data: Any
    loss_fn: Callable[..., Tensor]
    valid: Any
    score: Any
    folder: str
    rungs: tuple[int, ...]
    scheduler: Any
    options: Mapping[str, Any]  # scheduler_every, on_nonfinite and so on, for train_steps
    chunk_size: int | str | None
    device: Any
    save_every: float
    threads: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Job:
    """One batch in one rung.

    Attributes:
        trials: their numbers. parts, seeds: theirs. sources: the batch of the rung before, and the row in it, of each.
        attempt: how often it was handed out before, so that no two are taken for one.
    """

    task: Task
    rung: int
    number: int
    trials: tuple[int, ...]
    parts: tuple[Parts, ...]
    seeds: tuple[int, ...]
    sources: tuple[tuple[int, int], ...] = ()
    attempt: int = 0

    def __str__(self) -> str:
        few = ", ".join(map(str, self.trials[:4])) + ", …" * (len(self.trials) > 4)
        return f"batch {self.number} of rung {self.rung} (trials {few})"


def run_batch(job: Job, after_epoch: Callable[[int], None] | None = None) -> dict[str, list[float]]:
    """Train a batch up to its rung, and return its "scores" and "losses"; from its file, if that is there already.

    It goes on from where an earlier worker has left it. Out of memory, it is trained in chunks of half the size.

    Args:
        after_epoch: called with the number of epochs done; in this process only.
    """
    task, size = job.task, job.task.chunk_size
    with _ONE_AT_A_TIME, own_process(task):
        while not batch_file(task.folder, job.rung, job.number).exists():
            try:
                _train(job, size, after_epoch)
            except (MemoryError, RuntimeError) as error:
                largest = size if isinstance(size, int) else len(job.trials)
                if largest < 2 or not _is_out_of_memory(error):
                    raise
                size = (largest + 1) // 2
    return read_result(job)


def read_result(job: Job) -> dict[str, list[float]]:
    """Return the scores and losses out of a batch's file, and remove what it has made needless."""
    saved = read_batch(batch_file(job.task.folder, job.rung, job.number), _DONE)
    if tuple(saved["trials"]) != job.trials:
        raise ValueError(f"Expected {job} in {job.task.folder}, got trials {saved['trials']}: choose another folder.")
    batch_file(job.task.folder, job.rung, job.number, "part.").unlink(missing_ok=True)
    return {"scores": saved["scores"].tolist(), "losses": saved["losses"].tolist()}


def _train(job: Job, size: Any, after_epoch: Callable[[int], None] | None) -> None:
    task, parts, rung = job.task, job.parts, job.rung
    file, part = (batch_file(task.folder, rung, job.number, kind) for kind in ("", "part."))
    (data, own_data), (valid, own_valid) = (_batches(source, parts) for source in (task.data, task.valid))
    batch, optimizer, schedule = build_batch(task, parts, job.seeds, own_data)
    start, end = (0, *task.rungs)[rung], task.rungs[rung]
    if part.exists():
        saved = read_batch(part, _UNDER_WAY)
        start, known = saved["epoch"], saved["chunk_size"]
        size = known if not isinstance(size, int) else min(size, known or size)
        _load(batch, optimizer, schedule, saved["batch"], unpack(saved["optimizer"]), saved["schedule"])
    elif job.sources:
        _load(batch, optimizer, schedule, *_gather(job))
    settings = {name: [own.loss[name] for own in parts] for name in parts[0].loss}
    walked = _Walk(data, start)

    def at_end() -> None:
        if after_epoch:
            after_epoch(walked.epoch)
        if walked.epoch < end and time.monotonic() - walked.saved >= task.save_every:
            under_way = _state_of(batch, optimizer, schedule)
            write_tree(part, {"epoch": walked.epoch, "chunk_size": walked.chunk_size, **under_way}, _UNDER_WAY)
            walked.saved = time.monotonic()

    walked.at_end = at_end
    options = {**task.options, **({"loss_settings": settings} if settings else {})}
    if own_data:
        options.setdefault("shared_targets", False)
    if parts[0].max_norm is not None:
        options["max_norm"] = [own.max_norm for own in parts]
    options |= {"scheduler": schedule, "chunk_size": size, "first_epoch": start}
    total, steps, epoch = 0, 0, start - 1
    for step in train_steps(batch, optimizer, walked, task.loss_fn, end - start, **options):
        if step.epoch > epoch:
            total, steps, epoch = 0, 0, step.epoch
        total, steps = total + step.losses.double(), steps + 1
    losses = (total / steps).cpu()
    scores = _scores(task, batch, valid, not own_valid, settings, losses)
    whole = _state_of(batch, optimizer, schedule)
    if rung + 1 < len(task.rungs):
        rest = {name: whole[name] for name in ("optimizer", "schedule")}
        write_tree(state_file(task.folder, rung, job.number), rest, _STATE)
    done = {"trials": list(job.trials), "epoch": end, "scores": scores, "losses": losses, "batch": whole["batch"]}
    write_tree(file, done, _DONE)


def build_batch(task: Task, parts: Sequence[Parts], seeds: Sequence[int], own_data: bool = False) -> tuple:
    """Return the batch of some trials, their optimizer and their schedule, as before the first epoch."""
    models = []
    for own, seed in zip(parts, seeds, strict=True):
        with seeded(seed):
            models.append(task.build(**own.build))
    batch = ModelBatch(models, not own_data, seeds=seeds)
    batch = batch if task.device is None else batch.to(task.device)
    groups: list[dict[str, Any]] = [
        {"params": pattern, **{name: [own.groups[pattern][name] for own in parts] for name in names}}
        for pattern, names in parts[0].groups.items()
    ]
    optimizer = OptimizerFactory(task.optimizer_cls).create_optimizer(
        batch, [own.optimizer for own in parts], groups=[*groups, {"params": "*"}] if groups else None
    )
    return batch, optimizer, make_schedule(task.scheduler, optimizer)


class _Walk(PositionedBatches):
    """Walks through the data so that an epoch's order depends on its number only, whatever was drawn before."""

    def __init__(self, batches: Any, epoch: int) -> None:
        super().__init__(batches)
        self.epoch, self.saved = epoch, time.monotonic()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        torch.manual_seed(self.epoch)
        random.seed(self.epoch)
        np.random.seed(self.epoch)
        for owner in (self.batches, getattr(self.batches, "sampler", None)):  # a DataLoader's own generator
            if isinstance(getattr(owner, "generator", None), torch.Generator):
                owner.generator.manual_seed(self.epoch)
        yield from self.batches
        self.epoch += 1


def _batches(source: Any, parts: Sequence[Parts]) -> tuple[Any, bool]:
    """Return batches, and whether each model has its own: those that a callable makes from the trials' settings."""
    if not callable(source) or hasattr(source, "__iter__"):
        return source, False
    taken = inspect.signature(source).parameters
    own = {name: [each.data[name] for each in parts] for name in parts[0].data if name in taken}
    return source(**own), bool(own)


def _scores(task: Task, batch: Any, valid: Any, shared: bool, settings: Any, losses: Tensor) -> Tensor:
    """Return the trials' scores `[M]` in float64 on the CPU; higher is better."""
    if valid is None and isinstance(task.score, str):
        return -losses
    modes = {module: module.training for module in batch.modules()}
    batch.eval()
    try:
        with torch.no_grad():
            if task.score == "accuracy":
                scores = evaluate(batch, valid, shared_input=shared)
            elif task.score == "loss":
                scores = -_mean_loss(task, batch, valid, shared, settings)
            else:
                scores = task.score(batch, valid)
    finally:
        batch.train()
        for module, mode in modes.items():
            module.training = mode
    scores = torch.as_tensor(scores).detach().double().cpu()
    if scores.shape != (batch.num_models,):
        raise ValueError(f"Expected {batch.num_models} scores (one per model), got the shape {list(scores.shape)}.")
    return scores


def _mean_loss(task: Task, batch: Any, valid: Any, shared: bool, settings: Any) -> Tensor:
    extra = {"loss_settings": settings} if settings else {}
    total, count = 0, 0
    for x, y in walk(valid, 0, next(batch.parameters()).device):
        outputs = call(batch, x) if shared == batch.shared_input else batch(x, shared_input=shared)
        losses = batch.compute_loss(outputs, y, task.loss_fn, "none", shared_targets=None if shared else False, **extra)
        size = y.shape[0 if shared else 1] if isinstance(y, Tensor) else 1
        total, count = total + losses.double() * size, count + size
    return total / count


def _state_of(batch: Any, optimizer: Any, schedule: Any) -> dict[str, Any]:
    schedule = None if schedule is None else schedule.state_dict()
    return {"batch": save_whole(batch), "optimizer": pack(optimizer.get_model_states()), "schedule": schedule}


def _load(batch: Any, optimizer: Any, schedule: Any, models: Any, states: Any, scheduled: Any) -> None:
    load_whole(batch, models)
    optimizer.load_model_states(states)
    optimizer.note_step()
    if schedule is not None:
        schedule.load_state_dict(scheduled)


def _gather(job: Job) -> tuple[Any, list[dict[str, Any]], Any]:
    """Return the models that a batch goes on with, and their optimizers' state, out of the files of the rung before."""
    folder, rung = job.task.folder, job.rung - 1
    places: dict[int, list[int]] = {}
    for number, row in job.sources:
        places.setdefault(number, []).append(row)
    wholes, states, schedules = [], [], []
    for number, rows in places.items():  # trials are in the order of their numbers, and so in that of these batches
        saved = read_batch(batch_file(folder, rung, number), _DONE)
        rest = read_batch(state_file(folder, rung, number), _STATE)
        wholes.append(take(saved["batch"], rows))
        states += unpack(rest["optimizer"], rows)
        schedules.append((rest["schedule"], rows, len(saved["trials"])))
    return join(wholes), states, join_schedules(schedules)


@contextmanager
def own_process(task: Task) -> Iterator[None]:
    """Set the number of threads and the dtype of a sweep, and put them and all generators back afterwards."""
    before = torch.get_num_threads(), torch.get_default_dtype(), random_state(), random.getstate(), np.random.get_state()
    torch.set_num_threads(task.threads)
    torch.set_default_dtype(task.dtype)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])
        set_random_state(before[2])
        random.setstate(before[3])
        np.random.set_state(before[4])


def _is_out_of_memory(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in said
