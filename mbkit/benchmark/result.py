"""What a benchmark measured, as numbers, as a table and as a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.files import temporary
from ..common.tables import Tables, plain

__all__ = ["BenchmarkResult", "Timing", "save_json", "title_of"]


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

    All tensors are on the CPU. What was not measured, because the models were not trained alone as well, is None.

    Attributes:
        learning_rates: M numbers.
        seeds: M numbers; models of one seed start from the same weights.
        batched_seconds: [steps], raw times of one step of all models, warm-up excluded.
        alone_seconds: [steps, M], raw times of one step of each model, warm-up excluded.
        batched_loss, alone_loss: [all steps, M], before each update, warm-up included.
        batched_accuracy, alone_accuracy: [M], on the test set, from 0 to 1.
        parameter_difference: [M], the largest absolute difference between a model's parameters alone and in the batch.
        batched_memory, alone_memory: peak bytes above what the process held before: M models, their optimizers'
            states, and the step under way.
        setup: what was trained on what, as plain values.
        machine: device, threads and versions, as plain values.
    """

    learning_rates: list[float]
    seeds: list[int]
    batched_seconds: Tensor
    alone_seconds: Tensor | None
    batched_loss: Tensor
    alone_loss: Tensor | None
    batched_accuracy: Tensor
    alone_accuracy: Tensor | None
    parameter_difference: Tensor | None
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
    def alone(self) -> Timing | None:
        """Seconds a model and step alone, averaged over the models at each step."""
        return None if self.alone_seconds is None else Timing.of(self.alone_seconds.mean(1))

    @property
    def speedup(self) -> float | None:
        """The median time alone over the median time in the batch."""
        return None if self.alone is None else self.alone.median / self.batched.median

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists with the raw runs, fit for JSON; what is not finite becomes None."""
        summary = {"speedup": self.speedup, "batched": vars(self.batched), "alone": self.alone and vars(self.alone)}
        return plain({"summary": summary, **vars(self)})

    def save(self, path: str | Path) -> None:
        """Write everything, raw runs included, as JSON; folders are made, and an old file is replaced as a whole."""
        save_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> BenchmarkResult:
        """Read what `save` wrote, with NaN for what was not finite."""
        fields = {name: value for name, value in json.loads(Path(path).read_text()).items() if name != "summary"}
        for name in fields:
            if name.endswith(("seconds", "loss", "accuracy", "difference")) and fields[name] is not None:
                fields[name] = torch.from_numpy(np.array(fields[name], float))  # NumPy reads None as NaN
        return cls(**fields)

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        return [(self._title(), []), ("", self._sides()), ("", self._models()), (self._note(), [])]

    def _title(self) -> str:
        s = self.setup
        return (
            f"{self.num_models} x {s['model']} ({s['parameters']:,} parameters each) on {s['dataset']}\n"
            f"{s['optimizer']}, batches of {s['batch_size']}, {s['steps']} steps, {s['dtype']}\n"
            + title_of(self.machine)
        )

    def _sides(self) -> list[list[str]]:
        names = ["", "ms a model and step, median (quartiles)", "peak memory, MB", "best test accuracy", "speed-up"]
        batched = ["in the batch", str(self.batched), _megabytes(self.batched_memory)]
        batched.append(_percent(self.batched_accuracy.max()))
        if self.alone is None:
            return [list(row) for row in zip(names, batched, strict=False)]  # without a speed-up
        alone = ["alone", str(self.alone), _megabytes(self.alone_memory), _percent(self.alone_accuracy.max()), "1"]
        return [list(row) for row in zip(names, alone, [*batched, f"{self.speedup:.2f}"], strict=True)]

    def _models(self) -> list[list[str]]:
        rows = [["model", "learning rate", "seed", "test in the batch"]]
        for m, (rate, seed) in enumerate(zip(self.learning_rates, self.seeds, strict=True)):
            rows.append([str(m), f"{rate:.3g}", str(seed), _percent(self.batched_accuracy[m])])
        if self.alone is not None:
            rows[0] += ["test alone", "largest parameter difference"]
            for m, row in enumerate(rows[1:]):
                row += [_percent(self.alone_accuracy[m]), f"{self.parameter_difference[m].item():.1e}"]
        return rows

    def _note(self) -> str:
        timed = len(self.batched_seconds)
        note = f"{timed} steps timed, after {self.setup['warmup']} for warm-up; {self.setup['timing']}."
        if self.parameter_difference is not None and self.setup["dtype"] == "float32":
            note += (
                "\nIn float32 rounding grows as training goes on: plain PyTorch with another number of threads drifts "
                "from itself as well.\nWith dtype=torch.float64 the same comparison has no room for such drift."
            )
        return f"{note}\n{self.setup['dataset_note']}"


def save_json(path: str | Path, values: dict[str, Any]) -> None:
    """Write plain values to a file, which is replaced as a whole; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path) as part:
        part.write_text(json.dumps(values, allow_nan=False) + "\n")
        os.replace(part, path)


def title_of(m: dict[str, Any]) -> str:
    """Return a machine's name, its threads and the versions, from `describe_machine`."""
    return f"{m['device']}, {m['threads']} of {m['cores']} threads, torch {m['torch']}, mbkit {m['mbkit']}"


def _percent(share: Tensor) -> str:
    return f"{100 * share.item():.1f} %"


def _megabytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 1e6:.0f}"
