"""The suite's cases: networks of five kinds, at sizes from a handful to thousands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import GPT, MLP, LeNet5, LSTMClassifier, ResNet, build_models

__all__ = ["CASES", "NETWORKS", "Case"]


def _images(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=generator)


# The network's name -> what makes one, and what makes a batch of B inputs.
NETWORKS = {
    "MLP": (lambda: MLP((20, 16, 16, 4)), lambda count, g: torch.randn(count, 20, generator=g)),
    "LeNet5": (LeNet5, _images),
    "ResNet": (ResNet, _images),
    "GPT": (GPT, lambda count, g: torch.randint(64, (count, 32), generator=g)),
    "LSTM": (LSTMClassifier, lambda count, g: torch.randn(count, 32, 16, generator=g)),
}


@dataclass(frozen=True)
class Case:
    """One row of the suite.

    Args:
        network: a name in `NETWORKS`. num_models: M. batch_size: B.
    """

    network: str
    num_models: int
    batch_size: int

    def models(self) -> list[nn.Module]:
        """Return M models from seeds 0, 1, 2, …"""
        return build_models(NETWORKS[self.network][0], range(self.num_models))

    def data(self) -> tuple[Tensor, Tensor]:
        """Return one random batch, the same for all sides."""
        generator = torch.Generator().manual_seed(0)
        x = NETWORKS[self.network][1](self.batch_size, generator)
        return x, torch.randint(4, (self.batch_size,), generator=generator)


CASES = (
    *(Case("MLP", m, 32) for m in (1, 2, 16, 256, 16384)),
    *(Case("LeNet5", m, 128) for m in (4, 16, 64)),
    *(Case("LeNet5", 16, b) for b in (32, 512)),
    *(Case(name, m, 32) for name in ("ResNet", "GPT", "LSTM") for m in (2, 8)),
)
