"""How each fault of `faults.FAULTS` is planted in a batch: one function a fault, which can be combined."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .subject import BatchSubject, Recipe

__all__ = ["plant"]


def plant(recipe: Recipe, *names: str, seed: int = 0) -> Recipe:
    """Return a recipe that makes what `recipe` makes, with one or more faults in it.

    Args:
        recipe: makes a `BatchSubject`, as `BatchRecipe` does.
        *names: of `faults.FAULTS`.
        seed: decides what a fault leaves open: which model, which parameter, how large.

    Raises:
        ValueError: an unknown name; a fault for which the recipe has no place, such as a schedule that it lacks.

    Example:
        >>> from mbkit.subject import BatchRecipe
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
        recipe = _Planted(recipe, name, seed)
    return recipe


class _Planted:
    """A recipe with one fault; what is random about it is drawn anew, and alike, for each batch that it makes."""

    def __init__(self, recipe: Recipe, name: str, seed: int) -> None:
        self.recipe, self.name, self.seed = recipe, name, seed

    def __call__(self, models: list[nn.Module], configs: list[dict[str, Any]], seeds: list[int]) -> BatchSubject:
        draw, fault = random.Random(f"{self.name} {self.seed}"), _PLANTS[self.name]
        if self.name in _BEFORE:
            return self.recipe(*fault(models, configs, seeds, draw))
        subject = self.recipe(models, configs, seeds)
        fault(subject, draw)
        return subject


def _other_weights(models: Any, configs: Any, seeds: Any, draw: random.Random) -> Any:
    generator, models = torch.Generator().manual_seed(draw.getrandbits(32)), copy.deepcopy(models)
    for p in (p for model in models for p in model.parameters()):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        p.data.add_(noise, alpha=draw.uniform(0.01, 0.1))
    return models, configs, seeds


def _other_masks(models: Any, configs: Any, seeds: Any, draw: random.Random) -> Any:
    return models, configs, [seed + draw.randrange(1, 1000) for seed in seeds]


def _setting_of_model_0(models: Any, configs: Any, seeds: Any, draw: random.Random) -> Any:
    models = copy.deepcopy(models)
    for model in models:
        for module, first in zip(model.modules(), models[0].modules(), strict=True):
            module.__dict__.update({name: v for name, v in vars(first).items() if isinstance(v, float)})
    return models, [configs[0]] * len(configs), seeds


def _other_order(subject: BatchSubject, draw: random.Random) -> None:
    turn = draw.random()
    subject.walk = lambda batches: _turned(list(batches), turn)


def _turned(batches: list[Any], turn: float) -> list[Any]:
    first = 1 + int(turn * (len(batches) - 1))
    return batches[first:] + batches[:first]


def _other_mode(subject: BatchSubject, draw: random.Random) -> None:
    subject.batch.eval()


def _stale_gradients(subject: BatchSubject, draw: random.Random) -> None:
    subject.optimizer.zero_grad = lambda set_to_none=True: None


def _mean_loss(subject: BatchSubject, draw: random.Random) -> None:
    right, num_models = subject.batch.compute_loss, subject.batch.num_models
    subject.batch.compute_loss = lambda *args, **kwargs: right(*args, **kwargs) / num_models


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


def _clipped_across(subject: BatchSubject, draw: random.Random) -> None:
    subject.max_norm = draw.uniform(0.01, 0.1) if subject.max_norm is None else subject.max_norm
    parameters = list(subject.batch.parameters())

    def clip(max_norm: Any) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max(max_norm) if isinstance(max_norm, Sequence) else max_norm)

    subject.batch.clip_grad_norm_ = clip


def _schedule_m_times(subject: BatchSubject, draw: random.Random) -> None:
    if subject.schedule is None:
        raise ValueError("Expected a recipe with a schedule, got one without: pass BatchRecipe(..., scheduler=...).")
    step, num_models = subject.schedule.step, subject.batch.num_models
    subject.schedule.step = lambda: [step() for _ in range(num_models)]


def _shared_state(subject: BatchSubject, draw: random.Random) -> None:
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


def _overlapping(stacked: Tensor) -> Tensor:
    """Return a copy in memory that is too small: each model begins on the last number of the model before it."""
    size, whole = stacked[0].numel(), stacked.contiguous()
    memory = stacked.new_zeros(len(stacked) * (size - 1) + 1)
    return memory.as_strided(whole.shape, (size - 1, *whole.stride()[1:])).copy_(whole)


def _pick(draw: random.Random, choices: Any) -> Any:
    """Return one of the choices, or a number below `choices`."""
    place = draw.random()
    return int(place * choices) if isinstance(choices, int) else choices[int(place * len(choices))]


_BEFORE = {"other-weights", "other-masks", "setting-of-model-0"}  # changes what the batch is made of
_PLANTS: dict[str, Callable] = {
    "other-weights": _other_weights,
    "other-order": _other_order,
    "other-masks": _other_masks,
    "other-mode": _other_mode,
    "stale-gradients": _stale_gradients,
    "wrong-gradient": _wrong_gradient,
    "mean-loss": _mean_loss,
    "clipped-across-models": _clipped_across,
    "setting-of-model-0": _setting_of_model_0,
    "shared-optimizer-state": _shared_state,
    "leaking-update": _leaking_update,
    "shared-memory": _shared_memory,
    "schedule-stepped-M-times": _schedule_m_times,
}
