"""A sweep to begin with: a thousand small networks on the handwritten digits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.load import load_digits
from ..models import MLP, LeNet5
from .configs import sample
from .engine import sweep
from .result import SweepResult


def mlp(width: int, dropout: float) -> nn.Module:
    """Return an MLP for 8 x 8 digits."""
    return MLP([64, width, 10], dropout)


MODELS: dict[str, Any] = {"mlp": (mlp, {"width": [16, 32]}), "lenet": (LeNet5, {})}


@functools.cache
def _digits(model: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    images = [images.float() / 255 for images in (data.images, data.test_images)]
    if model == "mlp":
        images = [nn.functional.avg_pool2d(x[:, :1], 4).flatten(1) for x in images]
    return images[0], data.labels, images[1], data.test_labels


def digits_batches(model: str, test: bool = False) -> Any:
    """Return the digits' training batches, or the test set as one batch, as a model takes them."""
    x, y, test_x, test_y = _digits(model)
    return [(test_x, test_y)] if test else Batches(x, y, 128)


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
    data, valid = (functools.partial(digits_batches, model, test) for test in (False, True))
    configs, loss_fn = sample(space, n=trials, seed=seed), nn.functional.cross_entropy
    return sweep(build, torch.optim.AdamW, configs, data, loss_fn, valid=valid, folder=folder, rungs=rungs)
