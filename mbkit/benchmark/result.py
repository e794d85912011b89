"""What a benchmark measured, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.tables import Tables


@dataclass(frozen=True)
class Timing:
    """A median and the quartiles around it, in seconds a model and step.

    Example:
        >>> Timing.of(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
        Timing(median=3.0, low=2.0, high=4.0)
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Tensor) -> Timing:
        """Return the median and quartiles of raw times [steps]."""
        levels = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        return cls(*seconds.double().quantile(levels).tolist())

    def __str__(self) -> str:
        return f"{1e3 * self.median:.3g} ({1e3 * self.low:.3g} to {1e3 * self.high:.3g})"


@dataclass(frozen=True, eq=False, repr=False)
class BenchmarkResult(Tables):
    """M models trained alone and in a batch on the same batches: times, accuracies, differences; it prints as tables.

    All tensors are on the CPU.

    Attributes:
        learning_rates: M numbers.
        seeds: M numbers; models of one seed start from the same weights.
        batched_seconds: [steps], raw times of one step of all models, warm-up excluded.
        alone_seconds: [steps, M], raw times of one step of each model, warm-up excluded.
        batched_accuracy, alone_accuracy: [M], on the test set, from 0 to 1.
        parameter_difference: [M], the largest absolute difference between a model's parameters alone and in the batch.
        batched_memory, alone_memory: peak bytes above what the process held before: M models, their optimizers'
            states, and the step under way; None where that can't be told.
        setup: what was trained on what, as plain values.
        machine: device, threads and versions, as plain values.
    """

    learning_rates: list[float]
    seeds: list[int]
    batched_seconds: Tensor
    alone_seconds: Tensor
    batched_accuracy: Tensor
    alone_accuracy: Tensor
    parameter_difference: Tensor
    batched_memory: int | None
    alone_memory: int | None
    setup: dict[str, Any]
    machine: dict[str, Any]

    @property
    def num_models(self) -> int:
        """M."""
        return len(self.learning_rates)

    @property
    def batched(self) -> Timing:
        """Seconds a model and step in the batch."""
        return Timing.of(self.batched_seconds / self.num_models)

    @property
    def alone(self) -> Timing:
        """Seconds a model and step alone, averaged over the models at each step."""
        return Timing.of(self.alone_seconds.mean(1))

    @property
    def speedup(self) -> float:
        """The median time alone over the median time in the batch."""
        return self.alone.median / self.batched.median

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        s = self.setup
        title = (
            f"{self.num_models} x {s['model']} ({s['parameters']:,} parameters each) on {s['dataset']}\n"
            f"{s['optimizer']}, batches of {s['batch_size']}, {s['steps']} steps, {s['dtype']}\n"
            + title_of(self.machine)
        )
        names = ["", "ms a model and step, median (quartiles)", "peak memory, MB", "best test accuracy", "speed-up"]
        sides = [["alone", self.alone, self.alone_memory, self.alone_accuracy, "1"]]
        sides.append(["in the batch", self.batched, self.batched_memory, self.batched_accuracy, f"{self.speedup:.2f}"])
        columns = [[side, str(t), _megabytes(m), _percent(a.max()), ratio] for side, t, m, a, ratio in sides]
        models = [["model", "learning rate", "seed", "test in the batch", "test alone", "largest parameter difference"]]
        for m, (rate, seed) in enumerate(zip(self.learning_rates, self.seeds, strict=True)):
            accuracies = _percent(self.batched_accuracy[m]), _percent(self.alone_accuracy[m])
            models.append([str(m), f"{rate:.3g}", str(seed), *accuracies, f"{self.parameter_difference[m].item():.1e}"])
        note = f"{len(self.batched_seconds)} steps timed, after {s['warmup']} for warm-up; {s['timing']}."
        if s["dtype"] == "float32":
            note += (
                "\nIn float32 rounding grows as training goes on: plain PyTorch with another number of threads drifts "
                "from itself as well.\nWith dtype=torch.float64 the same comparison has no room for such drift."
            )
        rows = [list(row) for row in zip(names, *columns, strict=True)]
        return [(title, []), ("", rows), ("", models), (f"{note}\n{s['dataset_note']}", [])]


def title_of(m: dict[str, Any]) -> str:
    """Return a machine's name, its threads and the versions, from `describe_machine`."""
    return f"{m['device']}, {m['threads']} of {m['cores']} threads, torch {m['torch']}, mbkit {m['mbkit']}"


def _percent(share: Tensor) -> str:
    return f"{100 * share.item():.1f} %"


def _megabytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 1e6:.0f}"
