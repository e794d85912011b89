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
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .demo import PRESETS, Demo, Draws, draw, preset
from .faults import StaleGradientOptimizer
from .model_batch import ModelBatch
from .optim import OptimizerFactory
from .outcome import PUBLISHED, SWITCHES, Dissection, Outcome, switches

__all__ = ["PRESETS", "PUBLISHED", "Demo", "Dissection", "Outcome", "dissect", "preset", "run", "switches"]


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
    for switch, value in zip(SWITCHES, (gradients, weights, order), strict=True):
        if value not in SWITCHES[switch]:
            raise ValueError(f"Expected {' or '.join(SWITCHES[switch])} for {switch}, got {value!r}.")
    demo = preset(demo) if isinstance(demo, str) else demo
    draws = draw(demo)
    return _compare(demo, draws, _train_alone(demo, draws), (gradients, weights, order))


def dissect(demo: Demo | str) -> Dissection:
    """Run all eight combinations of the three faults on the very same draws.

    Example:
        >>> [outcome.verdict for outcome in dissect("published")].count("CONSISTENT")
        1
    """
    demo = preset(demo) if isinstance(demo, str) else demo
    draws = draw(demo)
    alone = _train_alone(demo, draws)
    return Dissection(_compare(demo, draws, alone, chosen) for chosen in itertools.product(*SWITCHES.values()))


def _train_alone(demo: Demo, draws: Draws) -> tuple[Tensor, Tensor]:
    """Train each model by itself in plain PyTorch; return accuracies [M] and parameters [steps, M, P]."""
    accuracies, paths = [], []
    for model, order, rate in zip(draws.models, draws.orders, demo.learning_rates, strict=True):
        model = copy.deepcopy(model)
        optimizer = demo.optimizer_cls(model.parameters(), lr=rate)
        correct, path = 0, []
        for batch in order:
            x, y = draws.points[batch], draws.labels[batch]
            optimizer.zero_grad()
            outputs = model(x)  # [B, K]
            F.cross_entropy(outputs, y).backward()
            correct += (outputs.argmax(-1) == y).sum().item()
            optimizer.step()
            path.append(torch.cat([p.detach().flatten() for p in model.parameters()]))  # [P]
        accuracies.append(correct / (demo.epochs * demo.samples))
        paths.append(torch.stack(path))
    return torch.tensor(accuracies, dtype=torch.float64), torch.stack(paths, 1)


def _train_batched(demo: Demo, draws: Draws, gradients: str, weights: str, order: str) -> tuple[Tensor, Tensor]:
    """Train all models at once; return accuracies [M] and parameters [steps, M, P]."""
    models = draws.models if weights == "same" else draws.other_models
    batch = ModelBatch(models, seeds=range(demo.num_models))  # no dropout, so the seeds decide nothing
    configs = [{"lr": rate} for rate in demo.learning_rates]
    if gradients == "stale":
        optimizer = StaleGradientOptimizer(batch, demo.optimizer_cls, configs)
    else:
        optimizer = OptimizerFactory(demo.optimizer_cls).create_optimizer(batch, configs)
    shared = order == "other"
    steps = draws.other_order if shared else [torch.stack(each) for each in zip(*draws.orders, strict=True)]  # [(M,) B]
    correct, path = torch.zeros(demo.num_models, dtype=torch.int64), []
    for indices in steps:
        x, y = draws.points[indices], draws.labels[indices]
        optimizer.zero_grad()
        outputs = batch(x, shared_input=shared)  # [M, B, K]
        batch.compute_loss(outputs, y, F.cross_entropy, shared_targets=shared).backward()
        correct += (outputs.argmax(-1) == y).sum(-1)
        optimizer.step()
        path.append(torch.cat([p.detach().flatten(1) for p in batch.parameters()], 1))  # [M, P]
    return correct.double() / (demo.epochs * demo.samples), torch.stack(path)


def _compare(demo: Demo, draws: Draws, alone: tuple[Tensor, Tensor], chosen: tuple[str, str, str]) -> Outcome:
    batched = _train_batched(demo, draws, *chosen)
    # Parameters that overflow alike (both inf or both nan) do not differ; where only one does, they differ without end.
    alike = (alone[1] == batched[1]) | (alone[1].isnan() & batched[1].isnan())
    gap = (alone[1] - batched[1]).abs().nan_to_num(nan=math.inf).masked_fill(alike, 0.0)  # [steps, M, P]
    return Outcome(demo, *chosen, alone[0], batched[0], gap.amax(2))
