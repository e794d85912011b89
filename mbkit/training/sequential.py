"""The reference: each model trained by plain PyTorch, one after the other, by the loop that everybody writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..common.checks import check_seeds, list_of_models, per_model
from .data_rng import Replay
from .evaluation import batch_accuracy
from .history import History, Step
from .loop import Pairs, call, check_run, count_steps, detach, first_tensor, make_schedule, part
from .recorder import Recording

__all__ = ["fit_alone", "lone_step", "own_targets"]


def fit_alone(
    models: Sequence[nn.Module],
    optimizer_cls: type[torch.optim.Optimizer],
    configs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    batches: Pairs,
    loss_fn: Callable[[Any, Any], Tensor],
    epochs: int = 1,
    *,
    seeds: Sequence[int] | None = None,
    shared_input: bool = True,
    shared_targets: bool | None = None,
    scheduler: Any = None,
    scheduler_every: str = "epoch",
    max_norm: float | Sequence[float] | None = None,
    callback: Callable[[Step], bool | None] | None = None,
    progress: bool = True,
) -> History:
    """Train each model in place by plain PyTorch, one after the other: what a batch of them is judged by.

    Model m trains after `torch.manual_seed(seeds[m])`. What the models draw never changes the data: each sees the
    batches that `fit`, called from the same state of torch's global generator, would see, also from a
    `DataLoader(shuffle=True)`; afterwards that generator stands as if the data had been drawn once. (What persistent
    workers of a DataLoader draw can't be drawn again; where it shows in the first batch, it is refused.)

    Args:
        models: M modules, trained in place.
        optimizer_cls: a class of torch.optim.
        configs: its keyword arguments, one dict for all models or a list of M.
        batches, loss_fn, epochs, scheduler_every, progress: as for `fit`; batches are walked through M times an epoch.
        seeds: one a model; drawn from torch's global generator, as ModelBatch draws them, when absent.
        shared_input: False where inputs are [M, B, ...] and model m gets inputs[m].
        shared_targets: False where targets are [M, B, ...]; told by their shape when absent.
        scheduler: a callable that makes an lr scheduler from an optimizer, or a list of M.
        max_norm: clip each model's gradient to this norm; one number or one a model.
        callback: called with each Step, whose `model` says whose it is; returning False ends *that model's* training.

    Returns:
        A History like that of `fit`, with step_seconds [steps, M]. Ctrl-C and exceptions are treated as there.

    Raises:
        TypeError: batches of the wrong kind, or an iterator that would be used up; a scheduler that is not callable.
        ValueError: fewer than 1 epoch, an empty walk, no model, another number of configs or seeds than models.

    Example:
        >>> models = [nn.Linear(4, 2) for _ in range(3)]
        >>> configs = [{"lr": lr} for lr in (0.1, 0.2, 0.3)]
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(5)]
        >>> history = fit_alone(models, torch.optim.SGD, configs, data, nn.functional.cross_entropy, seeds=range(3))
        >>> tuple(history.loss.shape)
        (5, 3)
    """
    models = list_of_models(models)
    num_models = len(models)
    check_run(batches, loss_fn, epochs, scheduler_every, walks=epochs * num_models)
    seeds = check_seeds(seeds, num_models)
    configs = per_model(dict(configs) if isinstance(configs, Mapping) else list(configs), num_models, "configs")
    schedulers = per_model(scheduler, num_models, "schedulers")
    norms = per_model(max_norm, num_models, "norms")

    def train(m: int, model: nn.Module, replay: Replay) -> Iterator[Step]:
        torch.manual_seed(seeds[m])
        optimizer = optimizer_cls(model.parameters(), **configs[m])
        schedule = make_schedule(schedulers[m], optimizer)
        index = 0
        for epoch in range(epochs):
            for x, y in replay.epoch(epoch):
                x = x if shared_input else part(x, m)
                y = own_targets(y, x, m, num_models, shared_targets)
                if not model.training:
                    model.train()
                start = time.perf_counter()
                loss, outputs = lone_step(model, optimizer, x, y, loss_fn, norms[m])
                seconds = time.perf_counter() - start
                if schedule and scheduler_every == "step":
                    schedule.step()
                accuracy = batch_accuracy(outputs.unsqueeze(0), y) if isinstance(outputs, Tensor) else None
                yield Step(index, epoch, loss.reshape(1), accuracy, seconds, m)
                index += 1
            if schedule and scheduler_every == "epoch":
                schedule.step()

    total = count_steps(batches, epochs * num_models)
    with Recording(num_models, total, alone=True, progress=progress) as run, Replay(batches, models) as replay:
        shown = callback and replay.data_draws()(callback)
        for m, model in enumerate(models):
            replay.restart()
            for step in train(m, model, replay):
                if not run.keep(step, shown):
                    break
    return run.history


def lone_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Any,
    y: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    max_norm: float | None = None,
) -> tuple[Tensor, Any]:
    """Make one update of one model; return its loss and its outputs from before the update, detached."""
    optimizer.zero_grad()
    outputs = call(model, x)
    loss = loss_fn(outputs, y)
    loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.detach(), detach(outputs)


def own_targets(targets: Any, inputs: Any, m: int, num_models: int, shared: bool | None) -> Any:
    """Return model m's targets: those for all, [B, ...], or its own out of [M, B, ...]; `inputs` are the model's own.

    `shared` says which of the two forms it is, None that the shape shall tell.

    Raises:
        ValueError: the shape fits both forms.
    """
    first = first_tensor(inputs)
    size = None if first is None or first.ndim == 0 else first.shape[0]

    def own(target: Tensor) -> Tensor:
        each = target.ndim > 1 and tuple(target.shape[:2]) == (num_models, size)
        if shared is None and each and target.shape[0] == size:
            raise ValueError(
                f"Targets {list(target.shape)} for {num_models} models and batches of {size} could be one for all or "
                "one a model: say which with shared_targets=True or shared_targets=False."
            )
        return target[m] if (each if shared is None else not shared) else target

    return tree_map_only(Tensor, own, targets)
