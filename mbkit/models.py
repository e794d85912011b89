"""The lessons' networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP", "LeNet5", "TinyMLP", "init_small_normal_"]


class MLP(nn.Module):
    """Linear layers with ReLU between them, and dropout after each ReLU.

    Args:
        sizes: features of the input, of each hidden layer, and of the output: two numbers or more.
        dropout: the rate, 0 to 1. At 0 nothing is drawn; the parameters' names do not depend on it.

    Raises:
        ValueError: fewer than two sizes, or a rate outside 0 to 1.

    Example:
        >>> import torch
        >>> MLP([20, 16, 16, 4])(torch.zeros(5, 20)).shape  # [B, 20] to [B, 4]
        torch.Size([5, 4])
    """

    def __init__(self, sizes: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"Expected at least an input and an output size, got {list(sizes)}: pass e.g. [8, 4, 2].")
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.dropout(F.relu(layer(x)))
        return self.layers[-1](x)  # [B, sizes[-1]]


class TinyMLP(MLP):
    """The published demo's network: an MLP (8, 4, 2) that starts with tiny weights and no biases.

    Built after `torch.manual_seed(s)` it has the demo's very weights: PyTorch's own initialization comes first and
    takes its share of random numbers, then each weight matrix is drawn again.

    Example:
        >>> [tuple(p.shape) for p in TinyMLP().parameters()]
        [(4, 8), (4,), (2, 4), (2,)]
    """

    def __init__(self, sizes: Sequence[int] = (8, 4, 2)) -> None:
        super().__init__(sizes)
        init_small_normal_(self)


class LeNet5(nn.Module):
    """LeNet for 3 x 32 x 32 images: two convolutions with max pooling, then 400-120-84-K.

    After LeCun et al. (1998), with today's habits: ReLU for tanh, max pooling, all channels connected, a linear end.

    Args:
        num_classes: K.
        dropout: the rate after each of the two hidden fully connected layers, 0 to 1.

    Example:
        >>> import torch
        >>> LeNet5()(torch.zeros(2, 3, 32, 32)).shape  # [B, 3, 32, 32] to [B, K]
        torch.Size([2, 10])
        >>> sum(p.numel() for p in LeNet5().parameters())
        62006
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # [B, 6, 14, 14]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [B, 16, 5, 5]
        x = self.dropout(F.relu(self.fc1(x.flatten(-3))))  # [B, 120]
        x = self.dropout(F.relu(self.fc2(x)))  # [B, 84]
        return self.fc3(x)  # [B, K]


def init_small_normal_(model: nn.Module, std: float = 0.01) -> nn.Module:
    """Draw each linear layer's weights from N(0, std²) in module order, set its biases to zero, return the model.

    Example:
        >>> init_small_normal_(nn.Linear(3, 2)).bias.tolist()
        [0.0, 0.0]
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
