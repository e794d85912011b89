"""A compiled step looks up the gradient of its max-pooling, and each model is still the one trained alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import trained_alone
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d

from mbkit import ModelBatch, OptimizerFactory
from mbkit.training.compiled import CompiledStep
from mbkit.training.options import StepOptions
from mbkit.vmap.rules.pooling import largest_of_windows

M, B, K, STEPS = 3, 6, 4, 3
RATES = [0.05, 0.1, 0.2]
aten = torch.ops.aten
RECTIFIED, SCATTERED = aten.threshold_backward.default, aten.max_pool2d_with_indices_backward.default


class Pooled(nn.Module):
    """A convolution to `[B, 3, 6, 6]`, pooled in a way to be tried."""

    def __init__(self, pool: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.conv, self.pool, self.out = nn.Conv2d(2, 3, 3, bias=bias), pool, nn.LazyLinear(K)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(self.conv(x)).flatten(1))


def indexed(h: Tensor) -> Tensor:
    pooled, index = max_pool2d(h, 2, return_indices=True)
    return pooled + 0.01 * index


def both(h: Tensor) -> Tensor:
    h = h.relu()
    return max_pool2d(h, 2) + h.mean()


def edited_before(h: Tensor) -> Tensor:
    """Edits what a ReLU was given, after the ReLU."""
    h = h * 1.0
    rectified = h.detach().relu()
    h *= 2.0
    return max_pool2d(rectified + h, 2) + max_pool2d(rectified, 2)


# What a pooling is -> how many gradients of ReLUs and scattered gradients a step has left.
WAYS = {
    "after a ReLU": (lambda h: max_pool2d(h.relu(), 2), (0, 0)),
    "after a module's ReLU": (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 2)), (0, 0)),
    "after a ReLU, turned": (lambda h: max_pool2d(h.relu().transpose(-1, -2), 2), (1, 1)),
    "after a ReLU, flipped": (lambda h: max_pool2d(h.relu().flip(-1), 2), (1, 0)),
    "after a ReLU in place": (lambda h: max_pool2d((h * 1.0).relu_(), 2), (1, 0)),
    "after a ReLU whose input is edited": (edited_before, (0, 0)),
    "after a ReLU that is used twice": (both, (1, 0)),
    "after no ReLU": (lambda h: max_pool2d(h, 2), (0, 0)),
    "after a tanh": (lambda h: max_pool2d(h.tanh(), 2, 2), (0, 0)),
    "with numbers left over": (lambda h: max_pool2d(h.relu(), (2, 4)), (0, 0)),
    "twice": (lambda h: max_pool2d(max_pool2d(h.relu(), (2, 1)).relu(), (1, 3)), (0, 0)),
    "of windows that overlap": (lambda h: max_pool2d(h.relu(), 3, 2), (1, 1)),
    "of windows with gaps": (lambda h: max_pool2d(h.relu(), 2, 3), (1, 1)),
    "padded": (lambda h: max_pool2d(h.relu(), 2, 2, 1), (1, 1)),
    "dilated": (lambda h: max_pool2d(h.relu(), 2, 2, 0, 2), (1, 1)),
    "rounded up": (lambda h: max_pool2d(h.relu(), (2, 4), ceil_mode=True), (1, 1)),
    "of large windows": (lambda h: max_pool2d(h.relu(), 4), (1, 1)),
    "with its index": (indexed, (0, 1)),
}


def train(pool: Callable, dtype: torch.dtype, bias: bool = True, ties: bool = True) -> tuple[ModelBatch, list]:
    torch.manual_seed(0)
    pairs = [(torch.randn(B, 2, 8, 8, dtype=dtype), torch.randint(K, (B,))) for _ in range(STEPS)]
    for x, _ in pairs:
        x[:2] = x[:2].sign() if ties else x[:2]  # windows with equal numbers
        x[2] = 0
    models = [Pooled(pool, bias).to(dtype) for _ in range(M)]
    for model in models:
        model(pairs[0][0])
    batch = ModelBatch(copy.deepcopy(models))
    step = CompiledStep(
        batch, OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATES), StepOptions(cross_entropy)
    )
    for x, y in pairs:
        assert step.attempt(x, y) is not None, step.reason
    return batch, alone(models, pairs)


def alone(models: list[nn.Module], pairs: list) -> list[dict[str, Tensor]]:
    configs = [{"lr": rate} for rate in RATES]
    return [model.state_dict() for model in trained_alone(models, pairs, loss_fn=cross_entropy, configs=configs)]


def test_inductor_makes_it_so_for_a_tiny_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, K)]
    models = [copy.deepcopy(nn.Sequential(*layers)) for _ in range(M)]
    pairs = [(torch.randn(B, 1, 5, 4), torch.randint(K, (B,))) for _ in range(STEPS)]
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATES)
    step = CompiledStep(batch, optimizer, StepOptions(cross_entropy))
    for x, y in pairs:
        assert step.attempt(x, y) is not None, step.reason
    for m, state in enumerate(alone(models, pairs)):
        torch.testing.assert_close(batch[m].state_dict(), state, rtol=0, atol=2e-6)


ALONE = pytest.param(torch.float64, id="as it lies alone", marks=pytest.mark.slow)


@pytest.mark.parametrize("dtype", [ALONE, pytest.param(torch.float32, id="channels last")])
@pytest.mark.parametrize("way", WAYS)
def test_a_looked_up_gradient_is_the_one_alone(graphs, way, dtype):
    pool, left = WAYS[way]
    batch, states = train(pool, dtype)
    for m, state in enumerate(states):
        bound = 1e-12 if dtype is torch.float64 else 2e-6
        torch.testing.assert_close(batch[m].state_dict(), state, rtol=0, atol=bound)
    count = tuple(sum(node.target is kind for node in graphs[0].graph.nodes) for kind in (RECTIFIED, SCATTERED))
    assert count == left
    kept = graphs[0].graph.find_nodes(op="output")[0].args[0]
    assert any(node.meta["val"].dtype is torch.int8 for node in kept) == (left[1] == 0)  # looked up, not found anew


@pytest.mark.usefixtures("graphs")
def test_a_convolution_without_a_bias():
    batch, states = train(WAYS["after a ReLU"][0], torch.float64, bias=False)
    for m, state in enumerate(states):
        torch.testing.assert_close(batch[m].state_dict(), state, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inductor_makes_it_so(dtype):
    batch, states = train(WAYS["with numbers left over"][0], dtype)
    for m, state in enumerate(states):
        bound = 1e-12 if dtype is torch.float64 else 2e-6
        torch.testing.assert_close(batch[m].state_dict(), state, rtol=0, atol=bound)


@pytest.mark.parametrize("window", [(2, 2), (3, 2), (1, 1)])
def test_the_place_in_a_window_is_the_one_that_torch_takes(window):
    """Of equal numbers the first, of several NaNs the last."""
    x = torch.randint(3, (5, 4, 7, 9), generator=torch.Generator().manual_seed(0)).double()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = torch.nan
    x[0, 0] = -torch.inf
    pooled, place = largest_of_windows(x, window, rectify=False)
    expected, index = max_pool2d(x, window, return_indices=True)
    assert torch.equal(pooled.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(place, (index // 9 % window[0] * window[1] + index % 9 % window[1]).to(torch.int8))
    expected, _ = max_pool2d(x.relu(), window, return_indices=True)
    pooled, rectified = largest_of_windows(x, window, rectify=True)
    assert torch.equal(pooled.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(rectified == -1, expected.relu() == 0)
