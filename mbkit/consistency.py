"""The published demo, to the decimal, and what its table is made of.

The library `modelbatch` printed a table in which three models trained in a batch end with other accuracies than the
same three trained alone. Three things differ there between the two runs: the batch's gradients are never cleared, it
starts from other initial weights, and it reads its data in another order. Here each can be switched on and off alone:

- gradients: "stale" trains with `faults.StaleGradientOptimizer`, "cleared" with mbkit's own optimizer;
- weights: "other" are drawn after the sequential runs, "same" are those from which the sequential models start;
- order: "other" is drawn after the sequential runs, one order for all models; "same" feeds model m of the batch, as
  per-model input, the very batches that model m saw alone (each sequential model has an order of its own).

As published, the accuracy is counted on each batch before the update on it, over all epochs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .demo import PRESETS, Demo, Draws, draw, preset
from .faults import StaleGradientOptimizer
from .model_batch import ModelBatch
from .optim import OptimizerFactory
from .outcome import PUBLISHED, SWITCHES, Dissection, Outcome, switches

__all__ = ["PRESETS", "PUBLISHED", "Demo", "Dissection", "Outcome", "dissect", "preset", "run", "switches", "walk"]


def run(demo: Demo | str, gradients: str = "stale", weights: str = "other", order: str = "other") -> Outcome:
    """Train the demo's models alone and in a batch, and compare; as published where nothing else is asked for.

    A pure function of its arguments: torch's default generator is left as it was.

    Args:
        demo: what to train, or the name of a preset.
        gradients: "stale" trains the batch with `faults.StaleGradientOptimizer`, "cleared" with mbkit's own optimizer.
        weights: "other" or "same" initial weights as the sequential models'.
        order: "other" or "same" batches as those that each sequential model saw.

    Raises:
        ValueError: an unknown preset or switch.

    Example:
        >>> outcome = run("published", gradients="cleared", weights="same", order="same")
        >>> outcome.max_difference, outcome.verdict
        (0.0, 'CONSISTENT')
    """
    *_, outcome = walk(demo, gradients, weights, order)
    return outcome


def walk(demo: Demo | str, gradients: str = "stale", weights: str = "other", order: str = "other") -> Iterator[Outcome]:
    """Do what `run` does, but give an `Outcome` after each of the batch's steps, of all steps so far.

    The models alone are trained before the first; where the same demo is asked for again, they are at hand.

    Example:
        >>> [f"{outcome.max_difference:.1%}" for outcome in walk("published")][::7]
        ['35.0%', '24.4%', '9.3%']
    """
    for switch, value in zip(SWITCHES, (gradients, weights, order), strict=True):
        if value not in SWITCHES[switch]:
            raise ValueError(f"Expected {' or '.join(SWITCHES[switch])} for {switch}, got {value!r}.")
    demo = preset(demo) if isinstance(demo, str) else demo
    return _compare(demo, *_alone(demo), (gradients, weights, order))


def dissect(demo: Demo | str) -> Dissection:
    """Run all eight combinations of the three faults on the very same draws.

    Example:
        >>> [outcome.verdict for outcome in dissect("published")].count("CONSISTENT")
        1
    """
    return Dissection(run(demo, *chosen) for chosen in itertools.product(*SWITCHES.values()))


@functools.lru_cache(maxsize=4)  # a switch is turned many times before the demo is changed
def _alone(demo: Demo) -> tuple[Draws, Tensor, Tensor]:
    """Return all that is drawn, and what comes of training each model by itself: see `_train_alone`."""
    draws = draw(demo)
    return draws, *_train_alone(demo, draws)


def _train_alone(demo: Demo, draws: Draws) -> tuple[Tensor, Tensor]:
    """Train each model by itself in plain PyTorch; return right answers [steps, M] and parameters [steps, M, P]."""
    answers, paths = [], []
    for model, order, rate in zip(draws.models, draws.orders, demo.learning_rates, strict=True):
        model = copy.deepcopy(model)
        optimizer = demo.optimizer_cls(model.parameters(), lr=rate)
        correct, path = [], []
        for batch in order:
            x, y = draws.points[batch], draws.labels[batch]
            optimizer.zero_grad()
            outputs = model(x)  # [B, K]
            F.cross_entropy(outputs, y).backward()
            correct.append((outputs.argmax(-1) == y).sum())
            optimizer.step()
            path.append(torch.cat([p.detach().flatten() for p in model.parameters()]))  # [P]
        answers.append(torch.stack(correct))
        paths.append(torch.stack(path))
    return torch.stack(answers, 1), torch.stack(paths, 1)


def _train_batched(
    demo: Demo, draws: Draws, gradients: str, weights: str, order: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Train all models at once; after each step give its number of points, right answers [M] and parameters [M, P]."""
    models = draws.models if weights == "same" else draws.other_models
    batch = ModelBatch(models, seeds=range(demo.num_models))  # no dropout, so the seeds decide nothing
    configs = [{"lr": rate} for rate in demo.learning_rates]
    if gradients == "stale":
        optimizer = StaleGradientOptimizer(batch, demo.optimizer_cls, configs)
    else:
        optimizer = OptimizerFactory(demo.optimizer_cls).create_optimizer(batch, configs)
    shared = order == "other"
    steps = draws.other_order if shared else [torch.stack(each) for each in zip(*draws.orders, strict=True)]  # [(M,) B]
    for indices in steps:
        x, y = draws.points[indices], draws.labels[indices]
        optimizer.zero_grad()
        outputs = batch(x, shared_input=shared)  # [M, B, K]
        batch.compute_loss(outputs, y, F.cross_entropy, shared_targets=shared).backward()
        right = (outputs.argmax(-1) == y).sum(-1)
        optimizer.step()
        yield indices.shape[-1], right, torch.cat([p.detach().flatten(1) for p in batch.parameters()], 1)  # [M, P]


def _compare(
    demo: Demo, draws: Draws, answers: Tensor, path: Tensor, chosen: tuple[str, str, str]
) -> Iterator[Outcome]:
    seen, right, gaps = 0, 0, path.new_empty(path.shape[:2])  # gaps [steps, M]
    for step, (points, correct, batched) in enumerate(_train_batched(demo, draws, *chosen)):
        seen, right, alone = seen + points, right + correct, path[step]
        # Parameters that overflow alike (both inf or both nan) do not differ; where only one does, they differ
        # without end.
        alike = (alone == batched) | (alone.isnan() & batched.isnan())
        gaps[step] = (alone - batched).abs().nan_to_num(nan=math.inf).masked_fill(alike, 0.0).amax(1)
        accuracies = answers[: step + 1].sum(0).double() / seen, right.double() / seen
        yield Outcome(demo, *chosen, *accuracies, gaps[: step + 1])
