"""The reference: each model trained by plain PyTorch, by the loop that everybody writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.clip import norm_limits
from ..common.checks import check_seeds, list_of_models, per_model
from ..common.objects import map_tensors
from ..common.random_streams import OwnDraws, in_turn
from ..vmap import autocast_off, autocast_to
from .evaluation import batch_accuracy
from .history import History, Step
from .loop import Pairs, call, check_run, count_steps, detach, make_schedule, own_targets, part, rounds
from .options import StepOptions
from .recorder import Recording, whole_update


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
    loss_settings: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    scheduler_every: str = "epoch",
    max_norm: float | Sequence[float] | None = None,
    autocast: torch.dtype | None = None,
    callback: Callable[[Step], bool | None] | None = None,
    progress: bool = True,
) -> History:
    """Train each model in place by plain PyTorch, as if it were alone: what a batch of them is judged by.

    The models take turns: on each batch model 0 makes a step, then model 1, and so on. None notices the others:
    model m draws from a random state of its own, which begins as after `torch.manual_seed(seeds[m])` (and Python's and
    NumPy's generators as after seeding them so); the data, and the callback, draw what they would draw for one model,
    so that all models see the batches that `fit`, called from the same state of the global generators, would see.

    Args:
        models: M modules, trained in place.
        optimizer_cls: a class of torch.optim.
        configs: its keyword arguments, one dict for all models or a list of M.
        batches, loss_fn, epochs, scheduler_every, autocast, progress: as for `fit`.
        seeds: one per model; drawn from torch's global generator, as ModelBatch draws them, when absent.
        shared_input: False where inputs are [M, B, ...] and model m gets inputs[m].
        shared_targets: False where targets are [M, B, ...]; told by their shape when absent.
        loss_settings: keyword arguments of loss_fn, as for ModelBatch.compute_loss: one value for all models or one
            per model; with {"beta": [0.1, 1.0, 4.0]} model 1 is trained on loss_fn(outputs, targets, beta=1.0).
        scheduler: a callable that makes an lr scheduler from an optimizer, or a list of M.
        max_norm: clip each model's gradient to this norm; one number or one per model.
        callback: called with each Step, whose `model` says whose it is; returning False ends *that model's* training.

    Returns:
        A History like that of `fit`, with step_seconds [steps, M]. Ctrl-C and exceptions are treated as there.

    Raises:
        TypeError: batches or configs of the wrong kind, or an iterator that would be used up; a scheduler that is not
            callable; loss_settings that are no dict.
        ValueError: fewer than 1 epoch, an empty walk, no model, another number of configs, seeds or values of a loss
            setting than models, a max_norm that is not positive; one module or parameter in two models; parameters
            on the meta device.

    Example:
        >>> models = [nn.Linear(4, 2) for _ in range(3)]
        >>> configs = [{"lr": lr} for lr in (0.1, 0.2, 0.3)]
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(5)]
        >>> history = fit_alone(models, torch.optim.SGD, configs, data, nn.functional.cross_entropy, seeds=range(3))
        >>> tuple(history.loss.shape)
        (5, 3)
    """
    models = lone_models(models)
    num_models = len(models)
    check_run(batches, loss_fn, epochs, scheduler_every)
    configs = check_configs(configs, num_models)
    schedulers = per_model(scheduler, num_models, "schedulers")
    norms = [None] * num_models if max_norm is None else norm_limits(max_norm, num_models)
    seeds = check_seeds(seeds, num_models)
    each = zip(models, seeds, configs, norms, schedulers, strict=True)
    lones = [LoneTrainer(model, seed, optimizer_cls, *rest) for model, seed, *rest in each]
    options = StepOptions(loss_fn, shared_targets=shared_targets, loss_settings=loss_settings)
    losses = [options.loss_of_model(m, num_models) for m in range(num_models)]
    total, precision = count_steps(batches, epochs * num_models), autocast_to(autocast, models[0])
    with Recording(num_models, total, alone=True, progress=progress) as run:
        going = list(range(num_models))

        def schedules() -> list[Any]:
            return [lones[m].schedule for m in going if lones[m].schedule]

        each = rounds(batches, range(epochs), models[0], scheduler_every, schedules)
        for index, (epoch, *pair, due) in enumerate(each):
            for m in in_turn(list(going)):
                lone, (x, y) = lones[m], fresh(pair) if len(going) > 1 else pair
                with whole_update(), lone.draws.current(), precision:
                    start = time.perf_counter()
                    loss, outputs = lone.update(x if shared_input else part(x, m), y, losses[m])
                    seconds = time.perf_counter() - start
                if lone.schedule and due:
                    lone.schedule.step()
                y = own_targets(y, outputs, m, num_models, options.forms)
                accuracy = batch_accuracy(outputs.unsqueeze(0), y) if isinstance(outputs, Tensor) else None
                if not run.keep(Step(index, epoch, loss.reshape(1), accuracy, seconds, m), callback):
                    going.remove(m)
                if run.interrupted:
                    going.clear()
                    break
            if not going:
                break
    return run.history


class LoneTrainer:
    """One model that trains by plain PyTorch, with a random state of its own while others train in between.

    Args:
        model: trained in place.
        seed: its random state begins as after `torch.manual_seed(seed)`.
        optimizer_cls: a class of torch.optim. config: its keyword arguments.
        max_norm: clip the gradient to this norm, or None.
        scheduler: a callable that makes an lr scheduler from the optimizer, or None.

    Attributes:
        optimizer, schedule: of this model; the caller steps the schedule.
        draws: the random state.

    Example:
        >>> lone = LoneTrainer(nn.Linear(2, 1), 0, torch.optim.SGD, {"lr": 0.1})
        >>> loss, outputs = lone.step(torch.ones(4, 2), torch.zeros(4, 1), nn.functional.mse_loss)
        >>> tuple(loss.shape), tuple(outputs.shape)
        ((), (4, 1))
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int,
        optimizer_cls: type[torch.optim.Optimizer],
        config: Mapping[str, Any],
        max_norm: float | None = None,
        scheduler: Callable[[Any], Any] | None = None,
    ) -> None:
        self.model, self.max_norm, self.draws = model, max_norm, OwnDraws(seed)
        with self.draws.current():
            self.optimizer = optimizer_cls(model.parameters(), **config)
            self.schedule = make_schedule(scheduler, self.optimizer)

    def update(self, x: Any, y: Any, loss_fn: Callable[[Any, Any], Tensor]) -> tuple[Tensor, Any]:
        """Make one update in train mode, drawing from whatever random state is the present one.

        Inside one `torch.autocast` that goes round many steps torch keeps the casts of weights from an earlier step (or
        from an evaluation without gradients); they are dropped here before and after, as leaving the autocast would do.
        """
        if not self.model.training:
            self.model.train()
        torch.clear_autocast_cache()
        self.optimizer.zero_grad()
        outputs = call(self.model, x)
        loss = loss_fn(outputs, y)
        with autocast_off(loss.device.type):
            loss.backward()
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            self.optimizer.step()
        torch.clear_autocast_cache()
        return loss.detach(), detach(outputs)

    def step(self, x: Any, y: Any, loss_fn: Callable[[Any, Any], Tensor]) -> tuple[Tensor, Any]:
        """Make one update, drawing from its own random state; return the loss and the outputs from before it."""
        with self.draws.current():
            return self.update(x, y, loss_fn)


def fresh(tree: Any) -> Any:
    """Return `tree` with a copy of every tensor in it, for a model may write into its inputs.

    One tensor in two places stays one: where inputs and targets are the same tensor, they are so for the model.
    """
    copies: dict[int, Tensor] = {}
    return map_tensors(lambda tensor: copies.setdefault(id(tensor), tensor.clone()), tree)


def check_configs(configs: Any, num_models: int) -> list[dict[str, Any]]:
    """Return M dicts of an optimizer's keyword arguments, from one for all models or from M.

    Raises:
        TypeError: something else than a dict or a list of dicts.
        ValueError: another number of dicts than M.

    Example:
        >>> check_configs({"lr": 0.1}, 2)
        [{'lr': 0.1}, {'lr': 0.1}]
    """
    each = [configs] * num_models if isinstance(configs, Mapping) else configs
    each = list(each) if isinstance(each, Iterable) else [each]
    if not all(isinstance(config, Mapping) for config in each):
        told = f"Expected configs as a dict of the optimizer's arguments, or one per model, got {configs!r}"
        raise TypeError(f"{told}: pass e.g. {{'lr': 0.1}}.")
    return [dict(config) for config in per_model(each, num_models, "configs")]


def lone_models(models: Any, may_share: bool = False) -> list[nn.Module]:
    """Return models as a list, unless there is one that cannot be trained alone.

    Raises:
        TypeError: something that is not a list of modules.
        ValueError: no models; parameters that hold no numbers or, unless they `may_share`, are in two models.
    """
    models, owners = list_of_models(models), {}
    for m, model in enumerate(models):
        for name, p in model.named_parameters():
            if p.is_meta:
                told = f"Expected parameters with numbers, got '{name}' of model {m} on the meta device"
                raise ValueError(f"{told}: call model.to_empty(device='cpu') and initialise it.")
            if owners.setdefault(id(p), m) != m and not may_share:
                told = f"Expected models that share nothing, got '{name}' of model {m} in model {owners[id(p)]}, too"
                raise ValueError(f"{told}, so that it would be trained twice: pass copies, e.g. by copy.deepcopy.")
    return models
