"""`sweep`: many configurations in batches, rung after rung, on files that let it go on after anything."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import check_seeds, whole_number
from ..common.progress import Progress
from ..vmap import check_autocast
from .configs import cut, divide, find_kinds, group_labels
from .executors import run_jobs
from .folder import batch_file, locked, plain_json, settle
from .result import SweepResult, Trial, group_scores, ordered
from .worker import Job, Task, read_result


def sweep(
    build: Callable[..., nn.Module],
    optimizer_cls: type[torch.optim.Optimizer],
    configs: Sequence[Mapping[str, Any]],
    data: Any,
    loss_fn: Callable[..., Tensor],
    *,
    valid: Any = None,
    score: str | Callable[[Any, Any], Any] = "accuracy",
    folder: str | Path | None = None,
    rungs: Sequence[int] = (1,),
    reduction_factor: int | None = 3,
    patience: int | None = None,
    models_per_batch: int = 64,
    groups: Any = None,
    seeds: Sequence[int] | None = None,
    scheduler: Callable[[Any], Any] | None = None,
    scheduler_every: str = "epoch",
    max_norm: float | None = None,
    on_nonfinite: str | None = None,
    shared_targets: bool | None = None,
    chunk_size: int | str | None = "auto",
    autocast: torch.dtype | None = None,
    device: Any = None,
    executor: Any = None,
    max_retries: int = 3,
    no_workers_timeout: float = 60.0,
    save_every: float = 10.0,
    progress: bool = True,
) -> SweepResult:
    """Train many configurations in batches of models, drop the worse ones rung by rung, and survive any crash.

    A trial is trained as `fit_alone` would train it: model t is built after `torch.manual_seed(seeds[t])` and draws
    from that seed on. Epoch e's walk through the data is made after `torch.manual_seed(e)`, and likewise for Python's
    and NumPy's generators, so that all trials see the same order.

    With a `folder` the sweep may be killed at any moment: the same call again goes on, and ends in the same bits. A
    batch that loses its worker goes on from its last saved epoch on another one. A second call meanwhile is refused,
    and so is one for another sweep. NaN is a score like others, the worst.

    Args:
        build: makes one model from the part of a configuration that no one else takes.
        optimizer_cls: a class of torch.optim.
        configs: a dict for each trial; see `grid` and `sample`. Names that the optimizer takes go to it (`lr@head` to
            the parameters that `head` names only, as in OptimizerFactory's groups), `loss_beta` to the loss as `beta`,
            `data_fold` to `data` as `fold`, `seed` and `max_norm` to whom they belong, all others to `build`.
        data: (inputs, targets) batches as for `fit`, or a callable that makes them, which a worker on another machine
            calls there. It gets the `data_*` settings of a batch's trials by name, a list of M for each, and then
            returns batches `[M, B, ...]`, such as `Batches(x, y, 32, seed=order, subsets=folds[fold])`.
        loss_fn: one model's outputs and targets, and `loss_*` settings by name, to one number.
        valid: batches, or a callable, as `data`. Without it the score is minus the last epoch's mean training loss.
        score: "accuracy"; "loss", for minus the mean loss over `valid`; or a function of the ModelBatch, in eval mode,
            and `valid` that returns M numbers. Higher is better.
        folder: where everything is kept; without it, in a temporary one that goes with the result.
        rungs: epochs after which trials are judged, ascending; the last number is how long the best are trained.
        reduction_factor: one in so many goes on from each rung to the next, at least one; None: all of them.
        patience: drop trials whose score has not improved for so many rungs.
        models_per_batch: how many trials are trained together. Configurations whose models are not alike are put in
            different batches. It is part of the sweep: another number gives other roundings.
        groups: trials that are ranked by the mean of their scores and go on together: the name or a tuple of names in
            which they differ (`"data_fold"`), or a label for each trial.
        seeds: one per trial; 0, 1, 2 … by default.
        scheduler: a callable that makes an lr scheduler of one model's optimizer; each trial has its own.
        scheduler_every, max_norm, on_nonfinite, shared_targets, chunk_size, autocast: as for `fit`. Scores are computed
            without autocast.
        device: where to train; by default where `build` puts the models.
        executor: None to train in this process; any `concurrent.futures.Executor` whose workers see the folder, such as
            Dask's `client.get_executor(pure=False)`; or a Dask Client. Dask replaces workers that die; a pool of
            processes breaks, and the same call with another goes on.
        max_retries: a batch is given up when its worker has died more often than this in a row without coming further.
        no_workers_timeout: seconds after which a Dask cluster without workers is an error.
        save_every: seconds after which a batch under way is saved at the end of an epoch.
        progress: show a bar on a terminal or in a notebook.

    Returns:
        A SweepResult, which prints itself as a table.

    Raises:
        TypeError, ValueError: a configuration with a name that nobody takes, another sweep's folder, a spoiled file.
        RuntimeError: another process runs this sweep; workers were lost too often, or there are none.
        OSError: the folder cannot be written. Whatever was trained before stays, and the same call goes on from there.

    Example:
        >>> from mbkit import MLP, Batches, grid
        >>> x, y = torch.randn(64, 4), torch.randint(2, (64,))
        >>> def build(width, dropout=0.0):
        ...     return nn.Sequential(nn.Linear(4, width), nn.Dropout(dropout), nn.Linear(width, 2))
        >>> configs = grid(lr=[0.1, 0.01, 0.001], width=[4, 8], dropout=[0.0, 0.5])
        >>> result = sweep(build, torch.optim.Adam, configs, Batches(x, y, 16), nn.functional.cross_entropy,
        ...                valid=[(x, y)], rungs=(1, 2), reduction_factor=3)
        >>> len(result), len([trial for trial in result.trials if trial.epochs == 2])
        (12, 4)
        >>> result.load(result.best)(x).shape
        torch.Size([64, 2])
    """
    configs = [dict(config) for config in configs]
    if not configs:
        raise ValueError("Expected at least one configuration, got none: see grid and sample.")
    rungs = _check_rungs(rungs)
    whole_number(models_per_batch, "models_per_batch")
    check_autocast(autocast)
    whole_number(max_retries, "max_retries", least=0)
    if reduction_factor is not None:
        whole_number(reduction_factor, "reduction_factor", least=2)
    if patience is not None:
        whole_number(patience, "patience")
    if isinstance(score, str) and score not in ("accuracy", "loss"):
        raise ValueError(f"Expected score 'accuracy', 'loss' or a function, got {score!r}.")
    parts = divide(configs, build, optimizer_cls)
    if any(own.data for own in parts) and not callable(data):
        raise TypeError(f"Expected data as a callable that takes the data_ settings, got {type(data).__name__}.")
    own_seeds = [own.seed for own in parts]
    if seeds is None:
        seeds = [t if seed is None else seed for t, seed in enumerate(own_seeds)]
    elif any(seed is not None for seed in own_seeds):
        raise ValueError("Got seeds both in the configurations and as seeds: keep one of the two.")
    seeds = check_seeds(seeds, len(configs))
    labels = group_labels(groups, configs)
    options = {"scheduler_every": scheduler_every, "on_nonfinite": on_nonfinite, "max_norm": max_norm}
    options |= {"shared_targets": shared_targets, "autocast": autocast}
    asked: dict[str, Any] = {
        "configs": configs, "seeds": seeds, "groups": labels, "rungs": rungs, "reduction_factor": reduction_factor,
        "patience": patience, "models_per_batch": models_per_batch, "optimizer": optimizer_cls, "build": build,
        "loss": loss_fn, "score": score, "scheduler": scheduler, "chunk_size": chunk_size, **options,
        "autocast": autocast and str(autocast),
    }  # fmt: skip
    asked = plain_json(asked)
    home = Path(tempfile.mkdtemp(prefix="mbkit-sweep-") if folder is None else folder).absolute()
    if folder is None:  # it goes when the last one who knows the parts does, which is the result
        weakref.finalize(parts[0], shutil.rmtree, home, ignore_errors=True)
    with locked(home):
        fresh: dict[str, Any] = {"threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype())}
        fresh["kinds"] = None if (home / "sweep.json").exists() else find_kinds(build, parts, seeds)
        settled = settle(home, asked, fresh)
        task = Task(
            build, optimizer_cls, data, loss_fn, valid, score, str(home), rungs, scheduler, options, chunk_size, device,
            save_every, settled["threads"], getattr(torch, settled["dtype"].removeprefix("torch.")),
        )  # fmt: skip
        trials = [Trial(t, config, seed) for t, (config, seed) in enumerate(zip(configs, seeds, strict=True))]
        workers = {"max_retries": max_retries, "no_workers_timeout": no_workers_timeout}
        run, going = partial(run_jobs, executor=executor, **workers), list(range(len(configs)))
        for rung in range(len(rungs)):
            jobs = []
            for number, own in enumerate(cut(going, settled["kinds"], models_per_batch)):
                sources = tuple(trials[t].places[-1] for t in own) if rung else ()
                own_parts, own_seeds = (tuple(each[t] for t in own) for each in (parts, seeds))
                jobs.append(Job(task, rung, number, tuple(own), own_parts, own_seeds, sources))
            _train_rung(jobs, trials, run, progress)
            going = _promoted(trials, going, labels, reduction_factor, patience)
            if not going:
                break
    return SweepResult(trials, task, parts, labels)


def _train_rung(jobs: Sequence[Job], trials: list[Trial], run: Callable[..., None], progress: bool) -> None:
    """Train the trials that have come this far up to a rung, those batches that are not there already."""
    task, rung = jobs[0].task, jobs[0].rung
    label = f"sweep, rung {rung + 1} of {len(task.rungs)}"
    with Progress(sum(len(job.trials) for job in jobs), label, progress) as bar:

        def note(job: Job, result: Mapping[str, list[float]]) -> None:
            for row, (t, *seen) in enumerate(zip(job.trials, result["scores"], result["losses"], strict=True)):
                trials[t].note(task.rungs[rung], *seen, (job.number, row))
            bar.advance(lambda: _best(trials), len(job.trials))

        left = []
        for job in jobs:
            if batch_file(task.folder, rung, job.number).exists():
                note(job, read_result(job))
            else:
                left.append(job)
        run(left, done=note)
    if rung:
        for file in Path(task.folder, f"rung-{rung - 1}").glob("*.state.safetensors"):
            file.unlink()


def _promoted(
    trials: Sequence[Trial],
    going: Sequence[int],
    labels: Sequence[Hashable],
    reduction_factor: int | None,
    patience: int | None,
) -> list[int]:
    """Return the trials out of `going` that go on to the next rung, by successive halving of whole rungs and patience.

    It depends on scores only, never on a clock; trials of one label stand and fall by the mean of their scores.
    """
    means = group_scores((trials[t] for t in going), labels)
    names = list(means)
    if reduction_factor is not None:
        order = ordered([means[name][-1] for name in names])
        names = [names[i] for i in order[: max(1, len(names) // reduction_factor)]]
    if patience is not None:
        names = [name for name in names if len(means[name]) - 1 - ordered(means[name])[0] < patience]
    kept = set(names)
    return sorted(t for t in going if labels[t] in kept)


def _best(trials: Sequence[Trial]) -> str:
    scored = [trial for trial in trials if trial.scores]
    best = scored[ordered([trial.score for trial in scored])[0]]
    return f"best {best.score:.4g} (trial {best.number})"


def _check_rungs(rungs: Any) -> tuple[int, ...]:
    rungs = (rungs,) if isinstance(rungs, int) else tuple(rungs)
    for epochs in rungs:
        whole_number(epochs, "rungs (epochs)")
    if not rungs or list(rungs) != sorted(set(rungs)):
        raise ValueError(f"Expected rungs as ascending numbers of epochs, got {rungs}: pass e.g. (1, 3, 9).")
    return rungs
