"""Grouped convolutions whose input's gradient is computed in another way: in float64 it is torch's own."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from oracle import close
from torch import Tensor

from mbkit.vmap.rules.grouped_convolution import on_a_cpu, on_a_gpu

B, GROUPS, IN, OUT = 2, 3, 2, 4


def assert_same(mine, torchs, what: str, x: Tensor, weight: Tensor, bias: Tensor | None, *how) -> str:
    """Compare outputs, gradients and a gradient of gradients; return the name of the node that made the output."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    seen = []
    for convolve in (mine, torchs):
        out = convolve(x, weight, bias, *how)
        first = torch.autograd.grad(out.pow(3).sum(), tensors, create_graph=True)
        seen.append([out, *first, *torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), tensors)])
    for got, expected in zip(*seen, strict=True):
        close(got, expected, 1e-10, what)
    return seen[0][0].grad_fn.name()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_on_a_gpu(dims):
    torchs, names = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[dims], set()
    windows = [1, 2, 3] if dims < 3 else [1, 2]
    for stride, padding, dilation, window, size in product((1, 2, 3), (0, 1, 2), (1, 2), windows, (6, 7)):
        if dims == 3 and stride == 3:
            continue
        what = f"{stride=} {padding=} {dilation=} {window=} {size=}"
        x = torch.randn(B, GROUPS * IN, *range(size, size + dims), dtype=torch.float64, requires_grad=True)
        weight = torch.randn(GROUPS * OUT, IN, *[window] * dims, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(GROUPS * OUT, dtype=torch.float64, requires_grad=True) if padding == 0 else None
        how = (stride,) * dims, (padding,) * dims, (dilation,) * dims, GROUPS
        names.add(assert_same(on_a_gpu, torchs, what, x, weight, bias, *how))
    assert {"_ConvolutionBackward", "ConvolutionBackward0", "AddBackward0"} <= names  # each of the three ways


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("channels", "out"), [(2, 16), (8, 32), (9, 16), (2, 8)])
def test_on_a_cpu(traced, channels, out, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for (height, width), padding, size in product([(1, 1), (5, 5), (2, 3)], [(0, 0), (0, 1), (1, 2)], (7, 8)):
        if padding[0] >= height or padding[1] >= width:
            continue
        x = torch.randn(B, GROUPS * channels, 7, size, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(GROUPS * out, channels, height, width, dtype=torch.float64, requires_grad=True)
        what, how = f"{height=} {width=} {padding=} {size=}", ((1, 1), padding, (1, 1), GROUPS)
        name = assert_same(partial(on_a_cpu, traced), torch.conv2d, what, x, weight, None, *how)
        ours = channels <= 8 and (channels * width > 8 if traced else out % 16 == 0)
        assert (name == "_ConvolutionBackward") == ours
