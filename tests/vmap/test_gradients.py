"""Gradients of stacked parameters have memory of their own, so that edits in place do to each what they do alone."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from oracle import close
from torch import nn

from mbkit import ModelBatch
from mbkit.vmap import separate_gradients

M = 3


class Adds(nn.Module):
    """Parameters that are added up, so that one gradient arrives at all of them."""

    def __init__(self, way, **shapes) -> None:
        super().__init__()
        self.way = way
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.way(self, x).tanh()


KINDS = {
    "RNN": lambda: nn.RNN(4, 5),
    "RNN relu": lambda: nn.RNN(4, 5, 2, nonlinearity="relu", bidirectional=True),
    "LSTM": lambda: nn.LSTM(4, 5),
    "LSTM proj": lambda: nn.LSTM(4, 5, proj_size=2),
    "GRU": lambda: nn.GRU(4, 5),
    "LSTMCell": lambda: nn.LSTMCell(4, 5),
    "x + a + b": lambda: Adds(lambda self, x: x + self.a + self.b, a=(4,), b=(4,)),
    "x + a + b - c": lambda: Adds(lambda self, x: x + self.a + self.b - self.c, a=(4,), b=(1, 4), c=(1, 1, 4)),
    "(a + b) * x": lambda: Adds(lambda self, x: (self.a + self.b) * x, a=(4,), b=(1, 4)),
    "cat(a, b) + c": lambda: Adds(lambda self, x: torch.cat([self.a, self.b]) + self.c + x, a=(2,), b=(2,), c=(4,)),
    "linear(x, v + w, a)": lambda: Adds(
        lambda self, x: nn.functional.linear(x, self.v + self.w, self.a), v=(2, 4), w=(2, 4), a=(2,)
    ),
}


def spans(parameters):
    """Return where each gradient begins and ends in memory."""
    grads = [p.grad for p in parameters if p.grad is not None]
    for g in grads:
        assert torch.ops.aten.is_non_overlapping_and_dense(g)  # none overlaps itself
    return sorted((g.data_ptr(), g.data_ptr() + g.numel() * g.element_size()) for g in grads)


def backward(module, x):
    out = module(x)
    out = out[0] if isinstance(out, tuple) else out
    (out.square().sum() + out.sum()).backward()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_edits_in_place_as_alone(kind, rows):
    torch.manual_seed(1)
    models = [KINDS[kind]().double() for _ in range(M)]
    batch = ModelBatch(copy.deepcopy(models))
    x = torch.randn(rows, 4, dtype=torch.float64)
    for module in (batch, *models):
        backward(module, x)
    ends = spans(batch.parameters())
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    for module in (batch, *models):
        backward(module, x)  # adds to the gradients in place
        list(module.parameters())[-1].grad.mul_(0.5)
    batch.clip_grad_norm_(0.1)
    for m, model in enumerate(models):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for name, p in model.named_parameters():
            close(batch.get_parameter(name).grad[m], p.grad, 1e-12, f"{name} of model {m}")


def test_the_gradient_of_the_input_is_not_a_parameters():
    """An adversarial example edits its gradient in place."""
    batch = ModelBatch([Adds(lambda self, x: x.flatten(1) + self.a, a=(4,)) for _ in range(M)], shared_input=False)
    x = torch.randn(M, 1, 2, 2, requires_grad=True)
    batch(x).sum().backward()
    expected = batch.a.grad.clone()
    x.grad.sign_()
    assert torch.equal(batch.a.grad, expected)


def test_one_batch_behind_another():
    first, second = (ModelBatch([KINDS["x + a + b"]() for _ in range(M)], shared_input=False) for _ in range(2))
    second(first(torch.randn(M, 1, 4))).sum().backward()
    ends = spans([*first.parameters(), *second.parameters()])
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))


def test_memory_is_taken_apart_where_it_is_shared_and_only_there():
    base = torch.arange(6.0)
    leaves = [torch.zeros(n, requires_grad=True) for n in (2, 6, 2, 3)]
    for leaf, gradient in zip(leaves, (base[:2], base, base[4:], torch.ones(3)), strict=True):
        leaf.grad = gradient
    separate_gradients(leaves)
    for leaf in leaves:
        leaf.grad.add_(1)
    assert [leaf.grad.tolist() for leaf in leaves] == [[1, 2], [1, 2, 3, 4, 5, 6], [5, 6], [2, 2, 2]]
