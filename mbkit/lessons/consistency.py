"""The published demo, to the decimal, and what its table is made of.

The library `modelbatch` printed a table in which three models trained in a batch end with other accuracies than the
same three trained alone. Three things differ there between the two runs, and each can be switched on and off alone:

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
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch.model_batch import ModelBatch
from ..optim import OptimizerFactory
from ..training.sequential import LoneTrainer
from ..training.step import batch_step
from ..verify.faults import StaleGradientOptimizer
from ..verify.measure import gap
from .demo import PRESETS, Demo, Draws, draw, preset
from .demo_result import PUBLISHED, SWITCHES, Dissection, Outcome, switches

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
        >>> *before, last = walk("published")
        >>> len(before), f"{last.max_difference:.1%}"
        (14, '9.3%')
    """
    for switch, value in zip(SWITCHES, (gradients, weights, order), strict=True):
        if value not in SWITCHES[switch]:
            raise ValueError(f"Expected {' or '.join(SWITCHES[switch])} for {switch}, got {value!r}.")
    demo = preset(demo) if isinstance(demo, str) else demo
    draws, answers, path = _alone(demo)
    shared = order == "other"
    # No dropout, so the seeds decide nothing.
    batch = ModelBatch(draws.models if weights == "same" else draws.other_models, shared, seeds=range(demo.num_models))
    configs = [{"lr": rate} for rate in demo.learning_rates]
    if gradients == "stale":
        optimizer = StaleGradientOptimizer(batch, demo.optimizer_cls, configs)
    else:
        optimizer = OptimizerFactory(demo.optimizer_cls).create_optimizer(batch, configs)
    steps = draws.other_order if shared else [torch.stack(each) for each in zip(*draws.orders, strict=True)]  # [(M,) B]
    seen, right, gaps = 0, 0, path.new_empty(path.shape[:2])  # gaps [steps, M]
    for step, indices in enumerate(steps):
        x, y = draws.points[indices], draws.labels[indices]
        _, outputs = batch_step(batch, optimizer, x, y, F.cross_entropy, shared_targets=shared)  # [M, B, K]
        seen, right = seen + indices.shape[-1], right + (outputs.argmax(-1) == y).sum(-1)
        batched = torch.cat([p.detach().flatten(1) for p in batch.parameters()], 1)  # [M, P]
        gaps[step] = gap(batched, path[step]).amax(1)
        accuracies = answers[: step + 1].sum(0).double() / seen, right.double() / seen
        yield Outcome(demo, gradients, weights, order, *accuracies, gaps[: step + 1])


def dissect(demo: Demo | str) -> Dissection:
    """Run all eight combinations of the three faults on the very same draws.

    Example:
        >>> [outcome.verdict for outcome in dissect("published")].count("CONSISTENT")
        1
    """
    return Dissection(run(demo, *chosen) for chosen in itertools.product(*SWITCHES.values()))


@functools.lru_cache(maxsize=4)  # a switch is turned many times before the demo is changed
def _alone(demo: Demo) -> tuple[Draws, Tensor, Tensor]:
    """Train each model by itself; return all that is drawn, right answers [steps, M] and parameters [steps, M, P]."""
    draws, answers, paths = draw(demo), [], []
    for model, order, rate in zip(draws.models, draws.orders, demo.learning_rates, strict=True):
        lone = LoneTrainer(copy.deepcopy(model), demo.seed, demo.optimizer_cls, {"lr": rate})
        correct, path = [], []
        for indices in order:
            x, y = draws.points[indices], draws.labels[indices]
            _, outputs = lone.update(x, y, F.cross_entropy)  # [B, K]
            correct.append((outputs.argmax(-1) == y).sum())
            path.append(torch.cat([p.detach().flatten() for p in lone.model.parameters()]))  # [P]
        answers.append(torch.stack(correct))
        paths.append(torch.stack(path))
    return draws, torch.stack(answers, 1), torch.stack(paths, 1)
