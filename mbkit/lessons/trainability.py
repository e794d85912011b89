"""Which learning rates train? One network for each pair of a first and a second layer's rate, all in one batch.

After Sohl-Dickstein, "The boundary of neural network trainability is fractal" (arXiv 2402.06184): a network with one
hidden layer of tanh units and no biases, all data in every step, plain gradient descent, and the same initial weights
everywhere, so that nothing but the two rates makes a difference. It differs in its size: 8 inputs, 8 hidden units and
16 points in place of 16, 16 and 272, and in what a color means: here it is the last loss, there a mean over all steps.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..batch.model_batch import ModelBatch
from ..figures.curves import CEILING, RateMap
from ..optim import OptimizerFactory
from ..training.batched import train_steps

GROUPS = ("first", "second")
WINDOW = ((0.01, 100.0), (0.01, 10.0))  # the demo's rates: from too slow to hopeless
Range = tuple[float, float]


class TwoLayers(nn.Module):
    """A network with one hidden layer of tanh units, without biases: two matrices, `first` and `second`.

    Example:
        >>> TwoLayers(8)(torch.zeros(5, 8)).shape
        torch.Size([5])
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.second = nn.Parameter(torch.randn(width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first).tanh() @ self.second  # [B, width] to [B]


def points(count: int = 16, width: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return the demo's data, one batch of random points `[B, width]` with random targets `[B]`."""
    generator = torch.Generator().manual_seed(42)
    return [(torch.randn(count, width, generator=generator), torch.randn(count, generator=generator))]


@dataclass(frozen=True, eq=False)
class Trainability:
    """What became of N x N networks; row i, column j has the i-th second and the j-th first rate.

    Attributes:
        first_rates: [N]. second_rates: [N].
        loss: [steps, N, N], before each of the steps made so far.
        steps: how many are to be made.
    """

    first_rates: Tensor
    second_rates: Tensor
    loss: Tensor
    steps: int

    @property
    def ratio(self) -> Tensor:
        """The last loss in units of the first one, [N, N]."""
        return self.loss[-1] / self.loss[0]

    @property
    def diverged(self) -> Tensor:
        """Whether the last loss is not finite or a quarter above the first one, [N, N] bools."""
        return ~(self.ratio <= CEILING)


class RateGrid:
    """N x N networks in one batch, trained again and again from the same weights with other pairs of rates.

    Args:
        build: makes the model, drawing its weights from torch's default generator, which is seeded before.
        batches: an iterable of (inputs, targets), as for `fit`.
        loss_fn: one model's outputs and targets to one number.
        groups: the names, as `create_optimizer(groups=…)` takes them, of the parameters of the first and second rate.
        size: N.
        seed: of the weights.
        optimizer_cls: a class of torch.optim.
        **hyperparameters: of the optimizer.

    Example:
        >>> *_, outcome = RateGrid(size=8).train(*WINDOW, steps=20)
        >>> outcome.loss.shape, bool(outcome.diverged[-1, -1]), bool(outcome.diverged[4, 4])
        (torch.Size([20, 8, 8]), True, False)
    """

    def __init__(
        self,
        build: Callable[[], nn.Module] = TwoLayers,
        batches: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] = F.mse_loss,
        *,
        groups: tuple[str, str] = GROUPS,
        size: int = 128,
        seed: int = 0,
        optimizer_cls: type[torch.optim.Optimizer] = torch.optim.SGD,
        **hyperparameters: Any,
    ) -> None:
        self.size, self.loss_fn = size, loss_fn
        self.batches = points() if batches is None else batches
        self.batch = ModelBatch.build(build, [seed] * size**2)
        factory = OptimizerFactory(optimizer_cls, hyperparameters)
        self.optimizer = factory.create_optimizer(self.batch, groups=[{"params": names, "lr": 0.0} for names in groups])
        self._start = {name: tensor.clone() for name, tensor in self.batch.state_dict().items()}

    def train(self, first_rates: Range, second_rates: Range, steps: int) -> Iterator[Trainability]:
        """Give a Trainability after each step, of all steps so far; all networks begin with the same weights.

        Args:
            first_rates: the lowest and the highest rate of the first group; those between are evenly spaced on a log
                scale. second_rates: likewise of the second group.
            steps: how many updates each network makes.

        Raises:
            ValueError: rates that are not 0 < lowest <= highest.
        """
        first, second = spaced(*first_rates, self.size), spaced(*second_rates, self.size)
        self.batch.load_state_dict(self._start)
        self.optimizer.state.clear()
        pairs = itertools.product(second.tolist(), first.tolist())
        rates = (rate for above, along in pairs for rate in (along, above))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        loss = torch.empty(steps, self.size, self.size)
        walk = train_steps(self.batch, self.optimizer, self.batches, self.loss_fn, steps)
        for done, step in enumerate(itertools.islice(walk, steps)):
            loss[done] = step.losses.view(self.size, self.size)
            yield Trainability(first, second, loss[: done + 1], steps)


def spaced(low: float, high: float, size: int, name: str = "rates") -> Tensor:
    """Return [N] float64 rates from low to high, evenly spaced on a log scale.

    Raises:
        ValueError: rates that are not 0 < low <= high.
    """
    if not 0 < low <= high < float("inf"):
        told = f"Expected {name} as the lowest and the highest rate, both above 0, got {low}, {high}"
        raise ValueError(f"{told}: pass (0.001, 1.0).")
    return torch.from_numpy(np.geomspace(low, high, size))


def film(path: str | Path, size: int = 128, steps: int = 60) -> None:
    """Train N x N networks and save how their map comes about, step by step, as a GIF.

    Args:
        path: of the GIF. size: N.
        steps: how many updates each network makes; after the first dozen one in four is shown.
    """
    shown, frames = None, []
    for done, outcome in enumerate(RateGrid(size=size).train(*WINDOW, steps=steps), 1):
        shown = shown or RateMap(outcome.first_rates, outcome.second_rates, steps, dpi=80)
        if done <= 12 or done % 4 == 0:
            shown.update(outcome, (size * 58 // 128, size * 60 // 128))
            frames.append(shown.frame())
    images = [Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE) for png in frames]
    durations = [150] * (len(images) - 1) + [3000]  # milliseconds
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)
