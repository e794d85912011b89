"""A sweep to begin with: a thousand small networks on the handwritten digits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.load import load_digits
from ..models import MLP, LeNet5
from .configs import sample
from .engine import sweep
from .result import SweepResult

__all__ = ["MODELS", "sweep_digits"]


def mlp(width: int, dropout: float) -> nn.Module:
    """Return an MLP for 8 x 8 digits."""
    return MLP([64, width, 10], dropout)


def lenet(dropout: float) -> nn.Module:
    """Return a LeNet for the digits at 32 x 32."""
    return LeNet5(dropout=dropout)


MODELS: dict[str, Any] = {"mlp": (mlp, {"width": [16, 32]}), "lenet": (lenet, {})}


@functools.cache
def _digits(model: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    images = [images.float() / 255 for images in (data.images, data.test_images)]
    if model == "mlp":
        images = [nn.functional.avg_pool2d(x[:, :1], 4).flatten(1) for x in images]
    return images[0], data.labels, images[1], data.test_labels


def training_batches(model: str) -> Any:
    """Return the digits' training batches."""
    from ..data import Batches

    x, y, _, _ = _digits(model)
    return Batches(x, y, 128)


def test_batches(model: str) -> Any:
    """Return the digits' test set as one batch."""
    _, _, x, y = _digits(model)
    return [(x, y)]


def sweep_digits(
    model: str = "mlp", trials: int = 1000, folder: str | Path | None = None, rungs: Any = (1, 3, 9), seed: int = 0
) -> SweepResult:
    """Search at random for learning rate, decay, dropout and width of networks on the digits.

    Args:
        model: "mlp" or "lenet". trials: how many.
        folder, rungs: as for `sweep`. seed: of the configurations.
    """
    build, own = MODELS[model]
    space = {"lr": (1e-4, 1e-1, "log"), "weight_decay": (1e-6, 1e-1, "log"), "dropout": (0.0, 0.6), **own}
    data = {"data": functools.partial(training_batches, model), "valid": functools.partial(test_batches, model)}
    settings = {"folder": folder, "rungs": rungs, **data}
    configs = sample(space, n=trials, seed=seed)
    return sweep(build, torch.optim.AdamW, configs, loss_fn=nn.functional.cross_entropy, **settings)
