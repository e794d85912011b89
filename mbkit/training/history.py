"""What a training run leaves behind: a Step for each update, and the History of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..common.tables import Tables, plain

_ROWS_SHOWN = 20


@dataclass(frozen=True)
class Step:
    """One update that has been made; its tensors stay on the device, so that looking costs a wait only where wanted.

    Attributes:
        index: how many updates came before it in this run.
        epoch: the epoch it belongs to, from 0.
        losses: [M], before the update; [1] where one model trains alone.
        accuracy: shaped as losses: the share of right answers in this batch before the update, from 0 to 1; or None.
        seconds: wall time of forward, backward and update, without fetching the batch. On an accelerator it is the
            time to hand the work over, because nothing here waits for the device.
        model: m where model m trains alone, None where all train together.
        frozen: [M], True for the models that this update left as they were; None where none was frozen.
        how: in words, how it was made: all models at once, in chunks, one by one, compiled.
    """

    index: int
    epoch: int
    losses: Tensor
    accuracy: Tensor | None
    seconds: float
    model: int | None = None
    frozen: Tensor | None = None
    how: str = ""


@dataclass(repr=False, eq=False)
class History(Tables):
    """The course of a training run of M models; it prints itself as a table.

    Attributes:
        loss: [steps, M] on the CPU, each before its update. NaN also where a model never made that step, because
            training alone was stopped before it: see steps_done.
        accuracy: [steps, M] from 0 to 1, counted on each batch before its update; None where it is not defined.
        seconds: wall time of the whole run.
        step_seconds: [steps], a step of all models; from fit_alone [steps, M], a step of each.
        epoch: [steps], the epoch of each step, from 0.
        steps_done: M counts, the steps up to each model's last update.
        interrupted: True where Ctrl-C ended the run.
        frozen: for each model the step from which on it was frozen to the end, or None; [] where none ever was.
        how: in words, how the last step was made, which is what `fit` has chosen.

    Example:
        >>> history = History(loss=torch.tensor([[3.0, 6.0], [1.0, 2.0]]), accuracy=None, seconds=0.1,
        ...                   step_seconds=torch.tensor([0.05, 0.05]), epoch=torch.tensor([0, 0]), steps_done=[2, 2])
        >>> history
        History: 2 models, 2 steps in 1 epoch, 0.1 s
        model  steps  first loss  last loss
        0          2           3          1
        1          2           6          2
        >>> history.final()["loss"]
        tensor([1., 2.])
    """

    loss: Tensor
    accuracy: Tensor | None
    seconds: float
    step_seconds: Tensor
    epoch: Tensor
    steps_done: list[int]
    interrupted: bool = False
    frozen: list[int | None] = field(default_factory=list)
    how: str = ""

    @property
    def num_models(self) -> int:
        """M."""
        return self.loss.shape[1]

    @property
    def steps(self) -> int:
        """The number of updates made, by the model that made most."""
        return self.loss.shape[0]

    @property
    def epochs(self) -> int:
        """The number of epochs begun."""
        return len(self.epoch.unique())

    def final(self) -> dict[str, Tensor | None]:
        """Return each model's last "loss" [M] and "accuracy" [M] or None; NaN for a model that made no step."""
        return {"loss": self._last(self.loss), "accuracy": None if self.accuracy is None else self._last(self.accuracy)}

    def by_epoch(self) -> dict[str, Tensor | None]:
        """Return the means over each epoch's steps, "loss" [epochs, M] and "accuracy" [epochs, M] or None.

        Every step counts the same, a smaller last batch too. NaN where a model did not make all of the steps.
        """
        masks = [self.epoch == number for number in self.epoch.unique()]

        def means(values: Tensor) -> Tensor:
            return torch.stack([values[mask].mean(0) for mask in masks]) if masks else values

        return {"loss": means(self.loss), "accuracy": None if self.accuracy is None else means(self.accuracy)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, fit for JSON; what is not finite becomes None."""
        return plain(vars(self))

    def __len__(self) -> int:
        return self.steps

    def _last(self, values: Tensor) -> Tensor:
        last = [values[done - 1, m] if done else values.new_tensor(math.nan) for m, done in enumerate(self.steps_done)]
        return torch.stack(last) if last else values.new_empty(0)

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        """A header and one row per model: its first and last loss, and its last epoch's mean accuracy."""
        end = (f", {self.how}" if self.how else "") + (", interrupted" if self.interrupted else "")
        counted = [_count(self.num_models, "model"), _count(self.steps, "step"), _count(self.epochs, "epoch")]
        title = f"History: {counted[0]}, {counted[1]} in {counted[2]}, {self.seconds:.3g} s{end}"
        header, last = ["model", "steps", "first loss", "last loss"], self.final()["loss"]
        accuracy = self.by_epoch()["accuracy"] if self.steps else None
        if accuracy is not None:
            header.append("accuracy in the last epoch")
        if self.frozen:
            header.append("frozen from step")
        rows = [header]
        for m, steps in enumerate(self.steps_done[:_ROWS_SHOWN]):
            losses = [f"{self.loss[0, m].item():.4g}", f"{last[m].item():.4g}"] if steps else ["-", "-"]
            rows.append([str(m), str(steps), *losses])
            if accuracy is not None:
                rows[-1].append(f"{100 * accuracy[-1, m].item():.1f} %")
            if self.frozen:
                rows[-1].append("-" if self.frozen[m] is None else str(self.frozen[m]))
        if self.num_models > _ROWS_SHOWN:
            rows.append(["..."] * len(header))
        return [(title, rows)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
