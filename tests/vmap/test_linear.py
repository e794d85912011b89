"""Linear layers whose weights are too large to be copied: the same gradients, in the order of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import M, close
from torch import Tensor, nn

from mbkit import ModelBatch
from mbkit.vmap.rules import linear

B, K = 5, 7
SHAPES = {"rows": (B, K), "sequences": (2, B, K), "more": (2, 3, B, K)}


def build(bias: bool) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, 3, bias=bias)).double() for _ in range(M)]


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_LARGE", 1)


def with_penalty(model: Callable, x: Tensor) -> Tensor:
    """The sum of the squared outputs, and of the squares of its gradient by the inputs."""
    total = model(x).pow(2).sum()
    (of_x,) = torch.autograd.grad(total, x, create_graph=True)
    return total + of_x.pow(2).sum()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_second_gradients(shape: str, bias: bool, own: bool) -> None:
    models = build(bias)
    x = torch.randn(*([M] if own else []), *SHAPES[shape], dtype=torch.float64, requires_grad=True)
    batch = ModelBatch(copy.deepcopy(models), shared_input=not own)
    weights = [param for param in batch.parameters() if param.dim() == 3]
    for gradient, weight in zip(torch.autograd.grad(batch(x).sum(), weights), weights, strict=True):
        assert gradient.stride() == weight.stride()  # or autograd copies it
    with_penalty(batch, x).backward() if own else batch(x).pow(2).sum().backward()
    of_x, x.grad = x.grad, None
    for m, model in enumerate(models):
        mine = x[m].detach().requires_grad_() if own else x
        with_penalty(model, mine).backward() if own else model(mine).pow(2).sum().backward()
        for name, param in model.named_parameters():
            expected = torch.zeros_like(param) if param.grad is None else param.grad
            close(batch.stacked_params[name].grad[m], expected, what=name)
        if own:
            close(of_x[m], mine.grad, what="the input's gradient")
    if not own:
        close(of_x, x.grad, what="the input's gradient")
