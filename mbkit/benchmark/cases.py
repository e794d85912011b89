"""The suite's cases: networks of six kinds, at sizes from a handful to thousands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import GPT, MLP, PINN, LeNet5, LSTMClassifier, ResNet, build_models


def _images(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=generator)


# The network's name -> what makes one, what makes a batch of B inputs, and its usual B.
NETWORKS = {
    "MLP": (lambda: MLP((20, 16, 16, 4)), lambda count, g: torch.randn(count, 20, generator=g), 32),
    "LeNet5": (LeNet5, _images, 128),
    "ResNet": (ResNet, _images, 32),
    "GPT": (GPT, lambda count, g: torch.randint(64, (count, 32), generator=g), 32),
    "LSTM": (LSTMClassifier, lambda count, g: torch.randn(count, 32, 16, generator=g), 32),
    "PINN": (PINN, lambda count, g: torch.rand(count, 2, generator=g), 256),
}


@dataclass(frozen=True)
class Case:
    """One row of the suite.

    Args:
        network: a name in `NETWORKS`. num_models: M. batch_size: B. device: where models and data are.
    """

    network: str
    num_models: int
    batch_size: int
    device: str = "cpu"

    def models(self, count: int | None = None) -> list[nn.Module]:
        """Return the first `count` of M models, from seeds 0, 1, 2, …"""
        built = build_models(NETWORKS[self.network][0], range(self.num_models if count is None else count))
        return [model.to(self.device) for model in built]

    def data(self) -> tuple[Tensor, Tensor]:
        """Return one random batch, the same for all sides."""
        generator = torch.Generator().manual_seed(0)
        x = NETWORKS[self.network][1](self.batch_size, generator)
        return x.to(self.device), torch.randint(4, (self.batch_size,), generator=generator).to(self.device)

    def configs(self) -> list[dict[str, float]]:
        """Return M learning rates for Adam, as configs."""
        return [{"lr": rate} for rate in torch.logspace(-4, -2, self.num_models).tolist()]

    @property
    def parameters(self) -> int:
        """How many numbers one model trains."""
        return sum(p.numel() for p in self.models(1)[0].parameters())


def cases_of(
    networks: Sequence[str], num_models: Sequence[int], batch_sizes: Sequence[int] = (), device: str = "cpu"
) -> list[Case]:
    """Return the cases of all sizes, the smallest M of all networks first; a network's usual batch size when absent.

    Example:
        >>> [(case.network, case.num_models) for case in cases_of(["MLP", "GPT"], [1, 8])]
        [('MLP', 1), ('GPT', 1), ('MLP', 8), ('GPT', 8)]
    """
    sizes = [(network, b) for network in networks for b in batch_sizes or [NETWORKS[network][2]]]
    return [Case(network, m, b, device) for m in num_models for network, b in sizes]


CASES = (
    *cases_of(["MLP"], (1, 2, 16, 256, 16384)),
    *cases_of(["LeNet5"], (4, 16, 64)),
    *cases_of(["LeNet5"], [16], (32, 512)),
    *cases_of(["ResNet", "GPT", "LSTM"], (2, 8)),
    *cases_of(["PINN"], (8, 64)),
)
