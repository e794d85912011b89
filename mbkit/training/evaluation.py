"""How good models are: the share of right answers in a batch while training; that, or any metric, over a data set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.targets import TargetForms
from .chunks import Chunks
from .loop import Pairs, call, check_batches, first_tensor, own_targets, part, walk


def count_correct(outputs: Any, targets: Any) -> tuple[Tensor, Tensor] | None:
    """Count the right answers of M models, where that is defined.

    It is defined for one float tensor of outputs and whole-numbered class labels: outputs [M, B, K] with labels [B] or
    [M, B]; also [M, B, ..., K] or torch's own [M, B, K, ...] with labels [B, ...] or [M, B, ...].

    Args:
        outputs: what M models returned; the class with the largest output is a model's answer.
        targets: the labels; negative ones (ignore_index=-100) do not count.

    Returns:
        (correct, counted), each [M] of int64, or None where it is not defined.

    Example:
        >>> count_correct(torch.tensor([[[0.1, 0.9], [0.8, 0.2]]]), torch.tensor([1, 1]))
        (tensor([1]), tensor([2]))
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim < 3:
        return None
    are_labels = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not are_labels or not outputs.is_floating_point():
        return None
    each = targets.shape[:1] == outputs.shape[:1] and targets.ndim == outputs.ndim - 1  # [M, B, ...]
    labels = targets if each else targets.unsqueeze(0)
    # The classes' dimension: the last, or the one after B as in torch's cross_entropy. Both: undefined.
    fits = [d for d in {2, outputs.ndim - 1} if (*outputs.shape[1:d], *outputs.shape[d + 1 :]) == labels.shape[1:]]
    if len(fits) != 1 or outputs.shape[fits[0]] < 2:
        return None
    counted = (labels >= 0).expand(len(outputs), *labels.shape[1:])
    correct = (outputs.argmax(fits[0]) == labels) & counted
    return correct.flatten(1).sum(1), counted.flatten(1).sum(1)


def batch_accuracy(outputs: Any, targets: Any) -> Tensor | None:
    """Return the share of right answers in one batch, [M] in the default dtype, or None where it is not defined."""
    counts = count_correct(outputs, targets)
    return None if counts is None else counts[0] / counts[1]


def evaluate(
    models: nn.Module | Sequence[nn.Module],
    batches: Pairs,
    *,
    metric: Callable[[Any, Any], Any] | Any = None,
    shared_input: bool | None = None,
    shared_targets: bool | None = None,
) -> Tensor:
    """Return each model's accuracy, or another metric, over `batches`, in eval mode and without gradients.

    A ModelBatch is called in chunks of models where all at once would not fit into half of the free memory, or where
    they are no faster on a CPU.

    Afterwards every submodule is back in the mode it had, so that a part put in eval mode on purpose stays so.

    Args:
        models: a ModelBatch, one module, or a list of M modules.
        batches: an iterable of (inputs, labels), or of what `fit` takes; it is walked through once.
        metric: instead of the accuracy. A function of one model's outputs and targets returns one number, whose mean is
            taken over the batches, each with the weight of its size; or a tuple (total, count), for a mean that is
            the sum of the totals over that of the counts. An object with update(outputs, targets) and compute(), such
            as torchmetrics has, is copied for each model.
        shared_input: False where inputs are [M, B, ...]. By default a ModelBatch's own setting, else True. With True,
            models that were trained on data of their own are measured on one test set.
        shared_targets: for a metric, as in ModelBatch.compute_loss, where the targets' shape could mean both.

    Returns:
        [M] of float64 on the CPU; [1] for one module. An accuracy is from 0 to 1.

    Raises:
        TypeError: something else than modules, batches that `fit` would not take, or a metric that cannot be called.
        ValueError: no batch, no model, outputs and labels for which accuracy is not defined, or a metric that returns
            several numbers.

    Example:
        >>> always_first = nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(always_first.weight), nn.init.constant_(always_first.bias[:1], 1.0)
        >>> evaluate(always_first, [(torch.randn(4, 2), torch.tensor([0, 0, 0, 1]))])
        tensor([0.7500], dtype=torch.float64)
        >>> evaluate(always_first, [(torch.randn(4, 2), torch.ones(4))], metric=lambda out, y: (out[:, 0] - y).sum())
        tensor([0.], dtype=torch.float64)
    """
    chunks = Chunks(models) if hasattr(models, "num_models") else None
    modules = [models] if isinstance(models, nn.Module) else list(models)
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        told = f"Expected a ModelBatch, a module or a list of modules, got {models!r}: pass what was trained."
        raise TypeError(told) if modules else ValueError(told)
    check_batches(batches, 1)
    shared = getattr(models, "shared_input", True) if shared_input is None else shared_input
    tallies = _tallies(metric, models.num_models if chunks is not None else len(modules))
    forms = TargetForms(shared_targets)
    correct, counted = 0, 0
    with torch.no_grad(), _eval_mode(modules):
        for x, y in walk(batches, 0, modules[0]):
            if chunks is not None:
                outputs = chunks.call(x, shared)
            else:
                answers = [call(module, x if shared else part(x, m)) for m, module in enumerate(modules)]
            if tallies:
                each = answers if chunks is None else [part(outputs, m) for m in range(len(tallies))]
                for m, (tally, own) in enumerate(zip(tallies, each, strict=True)):
                    tally.update(own, own_targets(y, own, m, len(each), forms))
                continue
            if chunks is None:
                outputs = torch.stack(answers) if all(isinstance(a, Tensor) for a in answers) else None
            counts = count_correct(outputs, y)
            if counts is None:
                told = "Expected outputs [B, K] of one float tensor and whole-numbered labels [B], got outputs"
                told += f" {_describe(outputs)} and labels {_describe(y)}"
                raise ValueError(f"{told}: pass metric=, a function of one model's outputs and targets.")
            correct, counted = correct + counts[0], counted + counts[1]
    if tallies:
        return torch.tensor([float(tally.compute()) for tally in tallies], dtype=torch.float64)
    return correct.double().cpu() / counted.double().cpu()


class _Mean:
    """The mean over batches of what a function of one model's outputs and targets returns."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function, self.total, self.count = function, 0.0, 0.0

    def update(self, outputs: Any, targets: Any) -> None:
        value, first = self.function(outputs, targets), first_tensor(outputs)
        rows = 1 if first is None or first.ndim == 0 else len(first)
        try:
            total, count = map(float, value) if isinstance(value, tuple) else (float(value) * rows, rows)
        except (TypeError, ValueError, RuntimeError) as error:
            told = f"Expected a metric that returns one number, or (total, count), got {value!r}"
            raise ValueError(f"{told}: average it.") from error
        self.total, self.count = self.total + total, self.count + count

    def compute(self) -> float:
        return self.total / self.count if self.count else float("nan")


def _tallies(metric: Any, num_models: int) -> list[Any]:
    """Return what adds up each model's measurements; nothing without a metric."""
    if metric is None:
        return []
    if all(callable(getattr(metric, verb, None)) for verb in ("update", "compute")):
        return [copy.deepcopy(metric) for _ in range(num_models)]
    if not callable(metric):
        raise TypeError(f"Expected metric(outputs, targets), got {metric!r}: pass e.g. nn.functional.mse_loss.")
    return [_Mean(metric) for _ in range(num_models)]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "that are no single tensor" if value is None else f"of type {type(value).__name__}"


@contextmanager
def _eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    modes = {each: each.training for module in modules for each in module.modules()}
    for module in modules:
        module.eval()
    # Inside one torch.autocast torch keeps casts of weights, which an update has changed since, and casts that are made
    # here, without gradients, must not be used by a later step.
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        for module in modules:
            module.train(modes[module])  # first through its own train(), which may do more than set flags
        for each, mode in modes.items():
            each.training = mode
