"""The networks of the lessons and of the benchmark suite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.machine import free_memory
from .common.random_streams import seeded


class MLP(nn.Module):
    """Linear layers with ReLU between them, and dropout after each ReLU.

    Args:
        sizes: features of the input, of each hidden layer, and of the output: two numbers or more.
        dropout: the rate, 0 to 1. At 0 nothing is drawn; the parameters' names do not depend on it.

    Raises:
        ValueError: fewer than two sizes, or a rate outside 0 to 1.

    Example:
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
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


class LeNet5(nn.Module):
    """LeNet for 3 x 32 x 32 images: two convolutions with max pooling, then 400-120-84-K.

    After LeCun et al. (1998), with today's habits: ReLU for tanh, max pooling, all channels connected, a linear end.

    Args:
        num_classes: K.
        dropout: the rate after each of the two hidden fully connected layers, 0 to 1.

    Example:
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


class ResNet(nn.Module):
    """A small residual network with BatchNorm for 3 x 32 x 32 images: a block for each width, halving the image.

    After He et al. (2016); the shortcut is a 1 x 1 convolution, as in their variant B.

    Args:
        num_classes: K.
        widths: channels of each block.

    Example:
        >>> ResNet()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        sizes = (widths[0], *widths)
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]))
        self.blocks = nn.ModuleList(_Residual(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((-2, -1)))  # [B, K]


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(inner + self.norms[2](self.shortcut(x)))


class GPT(nn.Module):
    """A small causal transformer over tokens `[B, T]` that predicts the next token after the last: `[B, K]`.

    After Radford et al. (2019): pre-norm blocks, GELU, learned positions.

    Args:
        num_tokens: K. length: the largest T. width: features, in 4 heads. depth: blocks. dropout: its rate.

    Example:
        >>> GPT()(torch.zeros(2, 32, dtype=torch.long)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self, num_tokens: int = 64, length: int = 32, width: int = 64, depth: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(num_tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[..., -1, :]))


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.queries, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.queries(self.norms[0](x)).unflatten(-1, (3 * self.heads, -1)).transpose(-3, -2)
        seen = F.scaled_dot_product_attention(*parts.chunk(3, -3), is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(-3, -2).flatten(-2)))
        return x + self.dropout(self.inner(self.norms[1](x)))


class PINN(nn.Module):
    """A network for Burgers' equation, u_t + u u_x = 0.01 / pi u_xx: it returns how far its u is from solving it.

    After Raissi et al. (2019), smaller: two hidden layers of 20. Its forward takes derivatives itself.

    Example:
        >>> PINN()(torch.rand(5, 2)).shape  # [B, 2], points (x, t), to [B, 1]
        torch.Size([5, 1])
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        u = self.net(points)
        (slopes,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        u_x, u_t = slopes.split(1, 1)
        (second,) = torch.autograd.grad(u_x.sum(), points, create_graph=True)
        return u_t + u * u_x - 0.01 / math.pi * second[:, :1]

    @staticmethod
    def loss_fn(residuals: Tensor, targets: Tensor) -> Tensor:
        """Return the mean square of the residuals; there are no targets."""
        return residuals.square().mean()


class LSTMClassifier(nn.Module):
    """An LSTM over `[B, T, features]` with a linear layer on its last output: `[B, K]`.

    Args:
        num_classes: K. features: of the input. hidden: of the LSTM.

    Example:
        >>> LSTMClassifier()(torch.zeros(2, 32, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, features: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][..., -1, :])


_COPIES = 4  # that training holds at least: the models, their parameters stacked, the gradients, the updated parameters


def build_models(build: Callable[[], nn.Module], seeds: Sequence[int]) -> list[nn.Module]:
    """Return one model per seed, each as after `torch.manual_seed(seed)`; torch's generator stays where it was.

    Args:
        build: makes one model, drawing its weights from torch's default generator.
        seeds: M whole numbers; each model is built anew, which is quicker than a deep copy.

    Raises:
        ValueError: more models than there is memory for, before they are built.

    Example:
        >>> first, second, again = build_models(lambda: nn.Linear(3, 2), [0, 1, 0])
        >>> torch.equal(first.weight, again.weight), torch.equal(first.weight, second.weight)
        (True, False)
    """
    with closing(each_built(build, seeds)) as built:
        models = list(itertools.islice(built, 1))
        each = _COPIES * sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers()))
        room = free_memory(torch.device("cpu")) // max(1, each)
        if len(seeds) > room:
            told = f"Expected at most {room:,} models of {each / _COPIES / 1e6:.3g} MB, as many as memory is for"
            raise ValueError(f"{told}, got {len(seeds):,}: train fewer.")
        return [*models, *built]


def each_built(build: Callable[[], nn.Module], seeds: Iterable[int]) -> Iterator[nn.Module]:
    """Yield one model per seed, as `build_models` makes them; afterwards torch's generator is where it was."""
    # Where there is no device, torch.manual_seed takes as long as a small model's weights, to remember the seed for it.
    seed_all = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    with seeded(0):
        for seed in seeds:
            seed_all(seed)
            model = build()
            if not isinstance(model, nn.Module):
                raise TypeError(f"Expected a function that builds an nn.Module, got {type(model).__name__}: return it.")
            yield model
            del model
