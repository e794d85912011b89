"""Defects planted on purpose, to learn from and to test `diagnose` with.

Each fault has a name in `FAULTS`; `plant` makes a recipe for a batch that has it. None of them is exported by `mbkit`:
whoever wants one has to write `mbkit.faults`.

Two pairs cannot be told apart by anybody, because the one leaves nothing for the other to act on: in eval mode no
random mask is drawn ("other-mode" hides "other-masks"), and a gradient in shared memory is overwritten by another
model's ("shared-memory" hides a "wrong-gradient" in the very same parameter).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.model_batch import ModelBatch
from ..common.checks import per_model
from .subject import BatchSubject, Recipe

__all__ = ["FAULTS", "StaleGradientOptimizer", "plant"]

# The name under which each fault is planted and reported -> what is wrong; and what plants it.
FAULTS: dict[str, str] = {}
_PLANTS: dict[str, Callable] = {}
_BEFORE = {"other-weights", "other-masks", "setting-of-model-0"}  # change what the batch is made of, not the batch


class StaleGradientOptimizer:
    """An optimizer that never clears the gradients it steps with: the published demo's defect, on purpose.

    It keeps a copy of every model's parameters, for a `torch.optim` optimizer. A step copies the stacked gradients to
    the copies, updates these, and copies the result back. All of that is right. But `zero_grad` clears the gradients
    of the *copies*, which the next step overwrites anyway, and not the *stacked* gradients, into which `backward` adds.
    Step 1 is therefore right, and step t follows the sum of t gradients. Nothing raises, the loss falls, and the
    accuracy looks plausible. It follows the library `modelbatch`, written anew.

    Args:
        batch: the M models; their stacked parameters are changed in place by `step`.
        optimizer_cls: a `torch.optim` class that steps without a closure.
        configs: M dicts of hyperparameters, one per model.

    Raises:
        ValueError: another number of configs than M.

    Example:
        >>> batch = ModelBatch([nn.Linear(1, 1, bias=False) for _ in range(2)])
        >>> optimizer = StaleGradientOptimizer(batch, torch.optim.SGD, [{"lr": 0.1}, {"lr": 0.2}])
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     batch(torch.ones(1, 1)).sum().backward()  # the gradient is 1, three times
        >>> batch.stacked_params["weight"].grad.flatten()
        tensor([3., 3.])
    """

    def __init__(
        self, batch: ModelBatch, optimizer_cls: type[torch.optim.Optimizer], configs: Sequence[Mapping[str, Any]]
    ) -> None:
        configs = per_model(list(configs), batch.num_models, "configs")
        self.batch = batch
        stacked_params = batch.stacked_params.values()
        models = range(batch.num_models)
        self.copies = [[nn.Parameter(stacked.detach()[m].clone()) for stacked in stacked_params] for m in models]
        self.lone = [optimizer_cls(copies, **config) for copies, config in zip(self.copies, configs, strict=True)]
        self.param_groups = [lone.param_groups[0] for lone in self.lone]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the copies only. This is the fault: `batch.zero_grad()` is missing here."""
        for lone in self.lone:
            lone.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self) -> None:
        """Copy the stacked gradients to the copies, update the copies, copy the result back."""
        for m, (copies, lone) in enumerate(zip(self.copies, self.lone, strict=True)):
            pairs = list(zip(copies, self.batch.stacked_params.values(), strict=True))
            for own, stacked in pairs:
                own.grad = None if stacked.grad is None else stacked.grad[m].clone()
            lone.step()
            for own, stacked in pairs:
                stacked[m] = own


def plant(recipe: Recipe, *names: str, seed: int = 0) -> Recipe:
    """Return a recipe that makes what `recipe` makes, with one or more faults in it.

    Args:
        recipe: makes a `BatchSubject`, as `BatchRecipe` does.
        *names: of `faults.FAULTS`.
        seed: decides what a fault leaves open: which model, which parameter, how large.

    Raises:
        ValueError: an unknown name; a fault for which the recipe has no place, such as a schedule that it lacks.

    Example:
        >>> from mbkit.verify.subject import BatchRecipe
        >>> recipe = plant(BatchRecipe(torch.optim.SGD), "mean-loss", "stale-gradients")
        >>> subject = recipe([nn.Linear(1, 1, bias=False) for _ in range(2)], [{"lr": 0.0}] * 2, [0, 1])
        >>> for _ in range(3):
        ...     _ = subject.step(torch.ones(1, 1), torch.zeros(1, 1), lambda outputs, _: outputs.sum())
        >>> subject.gradients(0)["weight"]  # 1 / 2, three times
        tensor([[1.5000]])
    """
    for name in names:
        if name not in _PLANTS:
            raise ValueError(f"Expected names of faults, got {name!r}: choose from {', '.join(_PLANTS)}.")
        recipe = partial(_planted, recipe, name, seed)
    return recipe


def _planted(recipe: Recipe, name: str, seed: int, *given: Any) -> BatchSubject:
    draw = random.Random(f"{name} {seed}")  # anew, and alike, for each batch
    if name in _BEFORE:
        return recipe(*_PLANTS[name](*given, draw))
    subject = recipe(*given)
    _PLANTS[name](subject, draw)
    return subject


def _fault(name: str, what_is_wrong: str) -> Callable[[Callable], Callable]:
    """Enter a fault into the tables."""

    def enter(plant: Callable) -> Callable:
        FAULTS[name], _PLANTS[name] = what_is_wrong, plant
        return plant

    return enter


@_fault("stale-gradients", "zero_grad() misses the stacked gradients, so each step adds to those of all earlier steps")
def _stale_gradients(subject: BatchSubject, draw: random.Random) -> None:
    subject.optimizer.zero_grad = lambda set_to_none=True: None


@_fault("other-weights", "the batch is built without seeding again, so it starts from other initial weights")
def _other_weights(models: Any, configs: Any, seeds: Any, draw: random.Random) -> Any:
    generator, models = torch.Generator().manual_seed(draw.getrandbits(32)), copy.deepcopy(models)
    for p in (p for model in models for p in model.parameters()):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        p.data.add_(noise, alpha=draw.uniform(0.01, 0.1))
    return models, configs, seeds


@_fault("other-order", "the batch reads its data without seeding again, so it sees other batches")
def _other_order(subject: BatchSubject, draw: random.Random) -> None:
    turn = draw.random()

    def turned(batches: Any) -> list[Any]:
        batches = list(batches)
        first = 1 + int(turn * (len(batches) - 1))
        return batches[first:] + batches[:first]

    subject.walk = turned


@_fault("other-masks", "the batch draws other random numbers than its models alone, so dropout takes out other units")
def _other_masks(models: Any, configs: Any, seeds: Any, draw: random.Random) -> Any:
    return models, configs, [seed + draw.randrange(1, 1000) for seed in seeds]


@_fault("other-mode", "the batch is in eval mode where its models alone are in train mode, or the other way round")
def _other_mode(subject: BatchSubject, draw: random.Random) -> None:
    subject.batch.eval()


@_fault("wrong-gradient", "the batch computes another gradient than autograd does for the model alone")
def _wrong_gradient(subject: BatchSubject, draw: random.Random) -> None:
    # Of a bias before BatchNorm the true gradient is zero, and twice zero is right.
    weights = [p for p in subject.batch.parameters() if p.dim() > 2] or list(subject.batch.parameters())
    m, p = _pick(draw, subject.batch.num_models), _pick(draw, weights)
    factor = 1 + draw.choice([-1, 1]) * draw.uniform(0.05, 0.5)

    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[m] *= factor
        return gradient

    p.register_hook(hook)


@_fault("mean-loss", "the loss is averaged over the M models and not added up, so every gradient is divided by M")
def _mean_loss(subject: BatchSubject, draw: random.Random) -> None:
    right, num_models = subject.batch.compute_loss, subject.batch.num_models
    subject.batch.compute_loss = lambda *args, **kwargs: right(*args, **kwargs) / num_models


@_fault("clipped-across-models", "all models' gradients are clipped by one common norm, not each model's by its own")
def _clipped_across_models(subject: BatchSubject, draw: random.Random) -> None:
    subject.max_norm = draw.uniform(0.01, 0.1) if subject.max_norm is None else subject.max_norm
    parameters = list(subject.batch.parameters())

    def clip(max_norm: Any) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max(max_norm) if isinstance(max_norm, Sequence) else max_norm)

    subject.batch.clip_grad_norm_ = clip


@_fault("setting-of-model-0", "model 0's setting is used for all models")
def _setting_of_model_0(models: Any, configs: Any, seeds: Any, draw: random.Random) -> Any:
    models = copy.deepcopy(models)
    for model in models:
        for module, first in zip(model.modules(), models[0].modules(), strict=True):
            module.__dict__.update({name: v for name, v in vars(first).items() if isinstance(v, float)})
    return models, [configs[0]] * len(configs), seeds


@_fault("shared-optimizer-state", "what the optimizer remembers of one model is mixed with another model's")
def _shared_optimizer_state(subject: BatchSubject, draw: random.Random) -> None:
    mix = draw.choice([
        lambda state: state.roll(1, 0),
        lambda state: state[:1].expand_as(state).clone(),
        lambda state: state.mean(0, keepdim=True).expand_as(state).clone(),
    ])  # fmt: skip

    def mixed(*_: Any) -> None:
        for states in subject.optimizer.state.values():
            for value in states.values():
                if value.dim() > 1:  # counts, [M], are alike anyway
                    value.copy_(mix(value))

    subject.optimizer.register_step_post_hook(mixed)


@_fault("leaking-update", "a part of one model's update is added to another model's parameters")
def _leaking_update(subject: BatchSubject, draw: random.Random) -> None:
    if subject.batch.num_models == 1:
        return
    source, sink = draw.sample(range(10**6), 2)
    source, sink = source % subject.batch.num_models, sink % subject.batch.num_models
    sink = (sink + 1) % subject.batch.num_models if sink == source else sink
    part, parameters, before = draw.uniform(0.01, 0.1), list(subject.batch.parameters()), []
    subject.optimizer.register_step_pre_hook(lambda *_: before.extend(p.detach()[source].clone() for p in parameters))

    def leak(*_: Any) -> None:
        for p, old in zip(parameters, before, strict=True):
            p.data[sink] += part * (p.data[source] - old)
        before.clear()

    subject.optimizer.register_step_post_hook(leak)


@_fault("shared-memory", "numbers of different models lie in the same memory, so that writing one changes the other")
def _shared_memory(subject: BatchSubject, draw: random.Random) -> None:
    p = _pick(draw, [p for p in subject.batch.parameters() if p[0].numel() > 1])
    kind = draw.choice(["parameters", "gradients", "states"])
    optimizer = subject.optimizer

    def states(*_: Any) -> None:
        for name, value in optimizer.state.get(p, {}).items():
            if value.shape == p.shape:
                optimizer.state[p][name] = _overlapping(value)

    if kind == "parameters":
        p.data = _overlapping(p.data)
    elif kind == "gradients":
        optimizer.register_step_pre_hook(lambda *_: setattr(p, "grad", _overlapping(p.grad)))
    else:
        optimizer.register_step_post_hook(states)


@_fault("schedule-stepped-M-times", "the schedule is stepped once a model in each step, M times as fast as alone")
def _schedule_stepped_m_times(subject: BatchSubject, draw: random.Random) -> None:
    if subject.schedule is None:
        raise ValueError("Expected a recipe with a schedule, got one without: pass BatchRecipe(..., scheduler=...).")
    step, num_models = subject.schedule.step, subject.batch.num_models
    subject.schedule.step = lambda: [step() for _ in range(num_models)]


def _overlapping(stacked: Tensor) -> Tensor:
    """Return a copy in memory that is too small: each model begins on the last number of the model before it."""
    size, whole = stacked[0].numel(), stacked.contiguous()
    memory = stacked.new_zeros(len(stacked) * (size - 1) + 1)
    return memory.as_strided(whole.shape, (size - 1, *whole.stride()[1:])).copy_(whole)


def _pick(draw: random.Random, choices: Any) -> Any:
    """Return one of the choices, or a number below `choices`."""
    place = draw.random()
    return int(place * choices) if isinstance(choices, int) else choices[int(place * len(choices))]
