"""What a worker does: train one batch of trials from one rung to the next, and leave the result in the folder."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import ModelBatch
from ..batch.whole_state import load_whole, save_whole
from ..common.files import write_tree
from ..common.random_streams import global_state, set_global_state
from ..optim import OptimizerFactory
from ..training import PositionedBatches, evaluate, train_steps
from ..training.loop import call, walk
from .configs import Parts, build_model, seed_all
from .folder import batch_file, read_batch

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


def run_batch(job: Job) -> dict[str, list[float]]:
    """Train a batch up to its rung, and return its "scores" and "losses"; from its file, if that is there already.

    It goes on from where an earlier worker has left it. Out of memory, it is trained in chunks of half the size.
    """
    task, size = job.task, job.task.chunk_size
    with _ONE_AT_A_TIME, own_process(task):
        while not batch_file(task.folder, job.rung, job.number).exists():
            try:
                _train(job, size)
            except (MemoryError, RuntimeError) as error:
                largest = size if isinstance(size, int) else len(job.trials)
                full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
                if largest < 2 or not full:
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


def _train(job: Job, size: Any) -> None:
    task, parts, rung = job.task, job.parts, job.rung
    file, part = (batch_file(task.folder, rung, job.number, kind) for kind in ("", "part."))
    (data, own_data), (valid, own_valid) = (_batches(source, parts) for source in (task.data, task.valid))
    start, end = (0, *task.rungs)[rung], task.rungs[rung]
    under_way = part.exists()
    if job.sources and not under_way:
        batch, states, scheduled = _gather(job, own_data)
    else:
        batch = build_batch(task, parts, job.seeds, own_data)
    optimizer, schedule = _optimizer(task, batch, parts)
    if under_way:
        saved = read_batch(part, _UNDER_WAY)
        start, known, scheduled = saved["epoch"], saved["chunk_size"], saved["schedule"]
        size = min(size, known or size) if isinstance(size, int) else known
        load_whole(batch, saved["batch"])
        optimizer.load_state_dict(saved["optimizer"])
    elif job.sources:
        optimizer.load_model_states(states)
    if under_way or job.sources:
        optimizer.note_step()
        if schedule is not None:
            schedule.load_state_dict(scheduled)
    walked = _Walk(data, start)

    def at_end() -> None:
        if walked.epoch < end and time.monotonic() - walked.saved >= task.save_every:
            where = {"epoch": walked.epoch, "chunk_size": walked.chunk_size, "batch": save_whole(batch)}
            write_tree(part, {**where, **_state_of(optimizer, schedule)}, _UNDER_WAY)
            walked.saved = time.monotonic()

    walked.at_end = at_end
    settings = {name: [own.loss[name] for own in parts] for name in parts[0].loss} or None
    options = {**task.options, "loss_settings": settings, "chunk_size": size}
    options |= {"scheduler": schedule, "first_epoch": start}
    if own_data:
        options["shared_targets"] = False
    if parts[0].max_norm is not None:
        options["max_norm"] = [own.max_norm for own in parts]
    losses, epoch = [], -1
    for step in train_steps(batch, optimizer, walked, task.loss_fn, end - start, **options):
        if step.epoch > epoch:
            losses, epoch = [], step.epoch
        losses.append(step.losses)
    loss = torch.stack(losses).double().mean(0).cpu()
    scores = _scores(task, batch, valid, not own_valid, settings, loss)
    if rung + 1 < len(task.rungs):
        write_tree(batch_file(task.folder, rung, job.number, "state."), _state_of(optimizer, schedule), _STATE)
    done = {"trials": list(job.trials), "epoch": end, "scores": scores, "losses": loss, "batch": save_whole(batch)}
    write_tree(file, done, _DONE)


def build_batch(task: Task, parts: Sequence[Parts], seeds: Sequence[int], own_data: bool = False) -> ModelBatch:
    """Return the models of some trials, as before the first epoch; inside of `own_process`."""
    trials = zip(parts, seeds, strict=True)
    batch = ModelBatch.build(lambda: build_model(task.build, *next(trials)), seeds, not own_data)
    return batch if task.device is None else batch.to(task.device)


def _optimizer(task: Task, batch: ModelBatch, parts: Sequence[Parts]) -> tuple[Any, Any]:
    """Return the optimizer and the schedule of some trials, as before the first epoch."""
    groups: list[dict[str, Any]] = [
        {"params": pattern, **{name: [own.groups[pattern][name] for own in parts] for name in names}}
        for pattern, names in parts[0].groups.items()
    ]
    factory, configs = OptimizerFactory(task.optimizer_cls), [own.optimizer for own in parts]
    optimizer = factory.create_optimizer(batch, configs, groups=[*groups, {"params": "*"}] if groups else None)
    if task.scheduler is None:
        return optimizer, None
    return optimizer, factory.create_lr_scheduler(optimizer, task.scheduler, {})


def _gather(job: Job, own_data: bool) -> tuple[ModelBatch, list[dict[str, Any]], Any]:
    """Return the models that a batch goes on with, and their optimizers' state, out of the files of the rung before."""
    places: dict[int, dict[int, Parts]] = {}
    for (number, row), own in zip(job.sources, job.parts, strict=True):
        places.setdefault(number, {})[row] = own
    batches, states, scheduled = [], [], []
    for number, chosen in places.items():  # trials are in the order of their numbers, and so in that of these batches
        saved = read_batch(batch_file(job.task.folder, job.rung - 1, number), _DONE)
        rest = read_batch(batch_file(job.task.folder, job.rung - 1, number, "state."), _STATE)
        count, rows = len(saved["trials"]), list(chosen)
        parts = [chosen.get(row, chosen[rows[0]]) for row in range(count)]  # what the others were does not matter
        whole = build_batch(job.task, parts, saved["batch"]["seeds"], own_data)
        load_whole(whole, saved["batch"])
        optimizer, _ = _optimizer(job.task, whole, parts)
        optimizer.load_state_dict(rest["optimizer"])
        batches.append(whole.select(rows))
        states += optimizer.get_model_states(rows)
        scheduled += [rest["schedule"]["schedulers"][row] for row in rows] if rest["schedule"] else []
    return batches[0] if len(batches) == 1 else ModelBatch.merge(batches), states, {"schedulers": scheduled}


def _state_of(optimizer: Any, schedule: Any) -> dict[str, Any]:
    return {"optimizer": optimizer.state_dict(), "schedule": None if schedule is None else schedule.state_dict()}


class _Walk(PositionedBatches):
    """Walks through the data so that an epoch's order depends on its number only, whatever was drawn before."""

    def __init__(self, batches: Any, epoch: int) -> None:
        super().__init__(batches)
        self.epoch, self.saved = epoch, time.monotonic()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        seed_all(self.epoch)
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
    batch.eval()  # to the end: the next rung makes another batch
    with torch.no_grad():
        if task.score == "accuracy":
            scores = evaluate(batch, valid, shared_input=shared)
        elif task.score == "loss":
            total, count, own = 0, 0, {"loss_settings": settings, "shared_targets": None if shared else False}
            for x, y in walk(valid, 0, batch):
                outputs = call(partial(batch, shared_input=shared), x)
                each = batch.compute_loss(outputs, y, task.loss_fn, "none", **own)
                size = y.shape[0 if shared else 1] if isinstance(y, Tensor) else 1
                total, count = total - each.double() * size, count + size
            scores = total / count
        else:
            scores = task.score(batch, valid)
    scores = torch.as_tensor(scores).detach().double().cpu()
    if scores.shape != (batch.num_models,):
        raise ValueError(f"Expected {batch.num_models} scores (one per model), got the shape {list(scores.shape)}.")
    return scores


@contextmanager
def own_process(task: Task) -> Iterator[None]:
    """Set the number of threads and the dtype of a sweep, and put them and all generators back afterwards."""
    threads, dtype, generators = torch.get_num_threads(), torch.get_default_dtype(), global_state()
    torch.set_num_threads(task.threads)
    torch.set_default_dtype(task.dtype)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        set_global_state(generators)
