"""Operators get their tensors by their names, too: all at once, and as alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import M, close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mbkit import ModelBatch
from mbkit.vmap.rules import convolution

CALLS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, nn.Module], Tensor]]] = {
    "conv1d": ((6, 4, 9), lambda x, net: F.conv1d(x, weight=net.w[..., 0, 0], bias=net.b, padding=1)),
    "conv1d, all": ((6, 4, 9), lambda x, net: F.conv1d(input=x, weight=net.w[..., 0, 0], stride=2)),
    "conv2d": ((6, 4, 9, 9), lambda x, net: F.conv2d(x, net.w[..., 0], padding=1, stride=(2, 1))),
    "conv2d, all": ((6, 4, 9, 9), lambda x, net: F.conv2d(input=x, weight=net.w[..., 0], bias=net.b)),
    "conv2d, same": ((6, 4, 9, 9), lambda x, net: F.conv2d(x, weight=net.w[..., 0], padding="same", dilation=2)),
    "conv3d": ((6, 4, 5, 5, 5), lambda x, net: F.conv3d(x, weight=net.w, padding=1)),
    "linear": ((6, 4), lambda x, net: F.linear(input=x, weight=net.w[..., 0, 0, 0], bias=net.b)),
    "dropout": ((6, 4), lambda x, net: torch.dropout(input=x * net.b[:4], p=0.5, train=True)),
    "prelu": ((6, 4), lambda x, net: F.prelu(input=x, weight=net.b[:4])),
    "embedding": ((6, 4), lambda x, net: F.embedding(input=x.abs().long().clamp(0, 3), weight=net.w[:4, :, 0, 0, 0])),
    "attention": ((6, 2, 4, 4), lambda x, net: F.scaled_dot_product_attention(key=x, value=x, query=x * net.b[:4])),
    "cross entropy": ((6, 4), lambda x, net: F.cross_entropy(input=x * net.b[:4], target=torch.arange(6) % 4)),
}


class Net(nn.Module):
    def __init__(self, call: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(8, 4, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self)


class Groups(TorchDispatchMode):
    """Notes the groups of each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.seen.append(args[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_as_alone(name: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "FOLDED_DTYPES", {torch.float64})
    shape, call = CALLS[name]
    models = [Net(call).double() for _ in range(M)]
    x = torch.randn(*([M] if own else []), *shape, dtype=torch.float64)
    batch = ModelBatch(copy.deepcopy(models), seeds=range(M), shared_input=not own)
    with Groups() as groups:
        outputs = batch(x)
    if name.startswith("conv2d") and own:
        assert groups.seen == [M]
    outputs.pow(2).sum().backward()
    assert batch.model_by_model == set()
    for m, model in enumerate(models):
        torch.manual_seed(m)
        expected = model(x[m] if own else x)
        expected.pow(2).sum().backward()
        close(outputs[m], expected)
        for key, param in model.named_parameters():
            if param.grad is not None:
                close(batch.stacked_params[key].grad[m], param.grad, what=key)
