"""The published demo's recipe: what is trained, and everything random that it draws.

All of it comes from one stream of torch's default generator, seeded once:

1. the points, and a `DataLoader(shuffle=True)`, which draws a new order from the stream at the start of every epoch;
2. M models for the sequential runs: PyTorch's initialization, then each weight normal with standard deviation 0.01;
3. for each sequential run in turn, the order of each of its epochs, so that every model has an order of its own;
4. M models for the batch, built like those of 2: "other" weights;
5. the order of the batch's epochs, one for all models: the "other" order.

All five are drawn each time, used or not, so that one switch changes one thing only; training draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..common.checks import check_seeds, did_you_mean, whole_number
from ..common.random_streams import seeded
from ..data.load import demo_points
from ..models import TinyMLP

# LBFGS wants a closure, SparseAdam sparse gradients.
OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if name not in ("Optimizer", "LBFGS", "SparseAdam") and isinstance(cls, type) and issubclass(cls, Optimizer)
}


@dataclass(frozen=True)
class Demo:
    """What is trained: M small classifiers that differ in their learning rates.

    Args:
        learning_rates: one per model; their number is M.
        sizes: units a layer: inputs, hidden layers, classes.
        epochs: how often each point is seen.
        samples: number of points.
        optimizer: a class of `torch.optim` or its name; the name is kept.
        batch_size: points in a batch.
        seed: of the one stream from which points, weights and orders are drawn.
        dtype: torch.float32 or torch.float64. Both draw the same numbers; float64 shows how much of a difference is
            rounding.

    Raises:
        ValueError: a setting that cannot be trained.

    Example:
        >>> Demo(learning_rates=[0.1], epochs=1)
        Demo(learning_rates=(0.1,), sizes=(8, 4, 2), epochs=1, samples=100, optimizer='Adam', batch_size=20, seed=42, \
dtype=torch.float32)
    """

    learning_rates: tuple[float, ...] = (0.001, 0.01, 0.1)
    sizes: tuple[int, ...] = (8, 4, 2)
    epochs: int = 3
    samples: int = 100
    optimizer: str = "Adam"
    batch_size: int = 20
    seed: int = 42
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("learning_rates", "sizes"):
            if not isinstance(getattr(self, name), Iterable):
                raise TypeError(f"Expected a list as {name}, got {getattr(self, name)!r}: pass [...].")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.learning_rates or not all(0 <= rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"Expected learning rates of 0 or more, one per model, got {[*self.learning_rates]}.")
        for name in ("epochs", "batch_size", "samples", "sizes"):
            for number in self.sizes if name == "sizes" else [getattr(self, name)]:
                whole_number(number, name)
        if len(self.sizes) < 2 or not 2 <= self.sizes[-1] <= min(self.sizes[0], self.samples):
            told = "Expected sizes from inputs to classes, 2 classes or more, each with an input that marks it"
            raise ValueError(f"{told} and a sample, got {self.sizes} for {self.samples} samples: pass e.g. (8, 4, 2).")
        check_seeds([self.seed], 1)
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Expected torch.float32 or torch.float64 as dtype, got {self.dtype}.")
        name = getattr(self.optimizer, "__name__", self.optimizer)
        if name not in OPTIMIZERS or self.optimizer not in (name, OPTIMIZERS[name]):
            got, guess = repr(self.optimizer), did_you_mean(str(name), OPTIMIZERS)
            raise ValueError(f"Expected a class of torch.optim that steps by dense gradients, got {got}.{guess}")
        object.__setattr__(self, "optimizer", name)

    @property
    def num_models(self) -> int:
        """M."""
        return len(self.learning_rates)

    @property
    def optimizer_cls(self) -> type[torch.optim.Optimizer]:
        """The class that `optimizer` names."""
        return OPTIMIZERS[self.optimizer]


PRESETS: dict[str, Demo] = {
    "published": Demo(),
    "quick": Demo(epochs=5),
    "full": Demo((0.001, 0.003, 0.01, 0.03), sizes=(20, 16, 16, 4), epochs=10, samples=500),
}


def preset(name: str, **changes: Any) -> Demo:
    """Return the preset called `name`, with some of its settings changed.

    Args:
        name: "published" (the table), "quick" (five epochs) or "full" (four larger models on 500 points).
        **changes: settings of `Demo`.

    Raises:
        ValueError, TypeError: an unknown preset or setting, or settings that cannot be trained.

    Example:
        >>> preset("full", epochs=2, seed=7).sizes
        (20, 16, 16, 4)
    """
    if name not in PRESETS:
        raise ValueError(f"Expected a preset, got {name!r}.{did_you_mean(name, PRESETS)}")
    return replace(PRESETS[name], **changes)


class Draws(NamedTuple):
    """All that is random: the five things that the module's docstring lists."""

    points: Tensor  # [samples, inputs]
    labels: Tensor  # [samples]
    models: list[nn.Module]  # M
    orders: list[list[Tensor]]  # [M][steps], the points [B] in each batch
    other_models: list[nn.Module]  # M
    other_order: list[Tensor]  # [steps]


def draw(demo: Demo) -> Draws:
    with seeded(demo.seed):
        points, labels = demo_points(demo.samples, demo.sizes[0], demo.sizes[-1])
        loader = DataLoader(torch.arange(demo.samples), batch_size=demo.batch_size, shuffle=True)

        def build() -> list[nn.Module]:
            return [TinyMLP(demo.sizes) for _ in demo.learning_rates]

        def read() -> list[Tensor]:
            return [batch for _ in range(demo.epochs) for batch in loader]

        models = build()
        orders = [read() for _ in models]
        others, order = build(), read()  # the faults: nothing is seeded again
    for model in (*models, *others):
        model.to(demo.dtype)
    return Draws(points.to(demo.dtype), labels, models, orders, others, order)
