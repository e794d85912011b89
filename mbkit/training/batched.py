"""Training M models in one batch; the reference that it is judged by, fit_alone, lives in sequential.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch.context import context_of
from ..batch.freeze import check_on_nonfinite
from ..common.checks import whole_number
from ..optim.ownership import check_scheduler, check_trains
from .checkpoint import Checkpoint
from .evaluation import batch_accuracy
from .history import History, Step
from .loop import Pairs, check_run, check_schedule, count_steps, make_schedule, rounds
from .options import StepOptions
from .position import PositionedBatches
from .recorder import Recording, whole_update
from .step import Stepper


def fit(
    batch: Any,
    optimizer: Any,
    batches: Pairs,
    loss_fn: Callable[..., Tensor],
    epochs: int = 1,
    *,
    loss_settings: Mapping[str, Any] | None = None,
    first_epoch: int = 0,
    scheduler: Any = None,
    scheduler_every: str = "epoch",
    max_norm: float | Sequence[float] | None = None,
    shared_targets: bool | None = None,
    on_nonfinite: str | None = None,
    chunk_size: int | str | None = "auto",
    compile: bool = False,
    autocast: torch.dtype | None = None,
    callback: Callable[[Step], bool | None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | str = "epoch",
    progress: bool = True,
) -> History:
    """Train a ModelBatch: clear the gradients, forward, backward, clip, update; batch after batch, epoch after epoch.

    Ctrl-C, or SIGTERM, lets the step under way end and returns the History so far, with `interrupted` set. A second one
    raises KeyboardInterrupt at once, which says so where it may have left an update half done. Any exception, say from
    the data, carries the History so far as its attribute `history`, and the batch holds what was trained.

    With `checkpoint=folder` the run is saved as it goes, and the same call again goes on where it ended: killed,
    interrupted, after an exception or a callback's False. The batch, optimizer, scheduler and data are made as before,
    and then everything is restored to the same bits: models, states, random streams and generators, the place within
    the epoch, and the History, of which the whole is returned. A run that is done is not trained further, but may be
    given more epochs. Another run's folder is refused, and changes nothing. `load_run` and `save_run` do it by hand.

    Args:
        batch: a ModelBatch of M models. It is put into train mode unless it is, so parts in eval mode stay so.
        optimizer: from OptimizerFactory, or anything with zero_grad() and step() over the batch's parameters.
        batches: an iterable of (inputs, targets), walked through once per epoch; its set_epoch(e), or its sampler's, is
            called first. Inputs and targets are [B, ...], or [M, B, ...] as the batch expects; a tuple of inputs is
            spread over the model's arguments, a dict over their names. Tensors are moved to the models' device. Also
            (input, another, targets); a dict whose labels, label, targets, target or y are the targets, which the model
            gets as well if it takes an argument of that name (`loss_fn=lambda out, y: out.loss`); and an object with
            such an attribute, which the model gets as a whole.
        loss_fn: one model's outputs and targets to one number.
        epochs: how many times to walk through the batches.
        loss_settings: keyword arguments of loss_fn, as in ModelBatch.compute_loss: each one value for all models, or
            one per model, as a list of M or a tensor `[M, ...]`.
        first_epoch: the first epoch's number, to go on where an earlier run ended: with the next epoch's order.
        scheduler: an lr scheduler of this optimizer, or a callable that makes one from it.
        scheduler_every: "epoch" or "step".
        max_norm: clip each model's gradient to this norm; one number or one per model.
        shared_targets: as in ModelBatch.compute_loss, where the targets' shape could mean both.
        on_nonfinite: what to do with a model whose loss or gradient is not finite, before that update is made:
            "freeze" stops it (see ModelBatch.freeze; the History says when), "raise" ends the run, None does nothing.
        chunk_size: how many models are trained at once, which changes no result; None for all. "auto" keeps their
            activations within 256 MiB on a CPU, past which larger chunks gain nothing, and within 4 GiB elsewhere. The
            first step finds out what a model keeps for its backward pass; the History names the size. It depends on
            sizes only, so two equal runs end in the same bits, unless half of the free memory is less than that: then
            chunks are smaller, and the History says so. A single model, one that fills a chunk and, on a CPU, models
            that are mostly wide convolutions run without vmap, which gains them nothing.
        compile: make each step as one function compiled by torch.compile: after half a minute of compilation at most
            far ahead for small models, and ahead for convolutional ones; on a GPU, where it is replayed as one CUDA
            graph, far ahead for all. Where that cannot be, or would not fit into memory without chunks, a warning says
            why and the steps run uncompiled.
        autocast: torch.bfloat16 to run forward and loss under torch.autocast, backward and update outside it. float16,
            which needs a scaler, is refused: write that loop yourself, with `mbkit.GradScaler`.
        callback: called with each Step; returning False ends the training. The scheduler's step has been made by then
            (that of an epoch only if the batches know their number). To stop single models, it calls `batch.freeze`.
        checkpoint: a folder to save the run in, and to take it up again from. checkpoint_every: "epoch", or a number of
            steps, after which it is saved; also at the end, and when Ctrl-C or the callback ends it.
        progress: show a bar on a terminal or in a notebook.

    Returns:
        A History: loss [steps, M], accuracy [steps, M] or None, and times.

    Raises:
        TypeError: an optimizer, scheduler or batches of the wrong kind, or an iterator that would be used up.
        ValueError: fewer than 1 epoch, an empty walk, an optimizer or a scheduler that belongs to another batch, or
            what ModelBatch refuses.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mbkit import ModelBatch, OptimizerFactory
        >>> batch = ModelBatch([nn.Linear(4, 2) for _ in range(3)])
        >>> optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=[0.1, 0.2, 0.3])
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(5)]
        >>> history = fit(batch, optimizer, data, nn.functional.cross_entropy, epochs=2)
        >>> tuple(history.loss.shape), tuple(history.accuracy.shape)
        ((10, 3), (10, 3))

        Early stopping: each model ends, as it would alone, once its loss on held-out data is the best no longer.

        >>> x, y, best = torch.randn(8, 4), torch.randint(2, (8,)), torch.full((3,), torch.inf)
        >>> def stop(step):
        ...     if (step.index + 1) % len(data) == 0:
        ...         with torch.no_grad():
        ...             losses = batch.compute_loss(batch.eval()(x), y, nn.functional.cross_entropy, reduction="none")
        ...         batch.freeze((losses > best).nonzero().flatten().tolist())
        ...         best.copy_(torch.minimum(best, losses))
        ...     return len(batch.frozen) < batch.num_models
        >>> history = fit(batch, optimizer, data, nn.functional.cross_entropy, epochs=5, callback=stop)
    """
    _check_batch(batch)
    check_run(batches, loss_fn, epochs, scheduler_every)
    whole_number(first_epoch, "first_epoch", least=0)
    total, saver = count_steps(batches, epochs), None
    how = {"max_norm": max_norm, "shared_targets": shared_targets, "on_nonfinite": on_nonfinite, "autocast": autocast}
    how |= {"loss_settings": loss_settings, "chunk_size": chunk_size, "compile": compile}
    if checkpoint is not None:
        scheduler = scheduler if hasattr(scheduler, "step") else make_schedule(scheduler, optimizer)
        settings = {"scheduler_every": scheduler_every, "first_epoch": first_epoch}
        trained = batch, optimizer, scheduler, batches, StepOptions(loss_fn, **how)
        saver = Checkpoint(checkpoint, checkpoint_every, *trained, settings)
        batches, end = saver, first_epoch + epochs
        first_epoch, epochs = batches.epoch, end - batches.epoch
        if chunk_size == "auto" and batches.chunk_size:  # as it was chosen in the run's first step
            how["chunk_size"] = batches.chunk_size
    before = ((), 0.0) if saver is None else (saver.steps, saver.seconds)
    with Recording(batch.num_models, total, progress=progress, steps=before[0], seconds=before[1]) as run:
        if saver is not None:
            saver.watch(run, end)
        how |= {"first_epoch": first_epoch, "scheduler": scheduler, "scheduler_every": scheduler_every}
        steps = train_steps(batch, optimizer, batches, loss_fn, max(epochs, 1), **how)
        for step in steps if epochs > 0 else ():
            go_on = run.keep(replace(step, index=len(run.steps)), callback)
            if saver is not None:
                saver.after_step(go_on)
            if not go_on:
                break
    return run.history


def train_steps(
    batch: Any,
    optimizer: Any,
    batches: Pairs,
    loss_fn: Callable[..., Tensor],
    epochs: int = 1,
    *,
    first_epoch: int = 0,
    scheduler: Any = None,
    scheduler_every: str = "epoch",
    **options: Any,
) -> Iterator[Step]:
    """Train as `fit` does, but yield a Step after each update: the caller can pause between them.

    Args: as for `fit`; `options` are max_norm, shared_targets, on_nonfinite, chunk_size, compile, loss_settings,
        autocast. All are checked at once, training starts with the first `next`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mbkit import ModelBatch, OptimizerFactory
        >>> batch = ModelBatch([nn.Linear(4, 2) for _ in range(3)])
        >>> optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
        >>> steps = train_steps(batch, optimizer, [(torch.randn(8, 4), torch.zeros(8, 2))], nn.functional.mse_loss)
        >>> next(steps).losses.shape
        torch.Size([3])
    """
    options = StepOptions(loss_fn, **options)
    _check_batch(batch)
    verbs = [getattr(optimizer, verb, None) for verb in ("step", "zero_grad")]
    if isinstance(optimizer, type) or not all(map(callable, verbs)):
        told = f"Expected an optimizer with step() and zero_grad(), got {optimizer!r}"
        raise TypeError(f"{told}: create one by OptimizerFactory(...).create_optimizer(batch, ...).")
    check_run(batches, loss_fn, epochs, scheduler_every)
    whole_number(first_epoch, "first_epoch", least=0)
    check_trains(optimizer, batch)
    check_on_nonfinite(options.on_nonfinite, optimizer)
    schedule = check_schedule(scheduler) if hasattr(scheduler, "step") else make_schedule(scheduler, optimizer)
    check_scheduler(schedule, optimizer)
    run = Stepper(batch, optimizer, options)

    def steps() -> Iterator[Step]:
        positioned = isinstance(batches, PositionedBatches)
        schedules, numbers = [schedule] if schedule else [], range(first_epoch, first_epoch + epochs)
        at_end = batches.at_end if positioned else None
        each = rounds(batches, numbers, batch, scheduler_every, lambda: schedules, at_end)
        for index, (epoch, x, y, due) in enumerate(each):
            if not batch.training:
                batch.train()
            start = time.perf_counter()
            with whole_update():
                losses, outputs = run.step(x, y)
                seconds = time.perf_counter() - start
                if schedule and due:
                    schedule.step()
            if positioned:
                batches.chunk_size = run.chunk_size
            frozen = context_of(batch).frozen
            yield Step(index, epoch, losses, batch_accuracy(outputs, y), seconds, frozen=frozen, how=run.how)

    return steps()


def _check_batch(batch: Any) -> None:
    if not hasattr(batch, "compute_loss"):
        told = f"Expected a ModelBatch, got {type(batch).__name__}"
        raise TypeError(f"{told}: pass ModelBatch(models), or use fit_alone for models.")
