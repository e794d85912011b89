"""A GPU's convolutions, on the CPU: in float64 what torch's own give, for each size, stride, padding and dilation."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from oracle import close
from torch.fx.experimental.proxy_tensor import make_fx

from mbkit.training.convolutions import FOR_A_GPU, FOR_AVX512, convolve, gradient_by_columns, gradients

B, GROUPS, IN, OUT = 2, 3, 2, 4


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradients_are_torchs(dims):
    convolution = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[dims]
    tried = 0
    for stride, padding, dilation, window, size in product((1, 2, 3), (0, 1, 2), (1, 2), (1, 2, 3), (7, 8)):
        if padding > dilation * (window - 1):
            continue  # left to torch's own
        what = f"{stride=} {padding=} {dilation=} {window=} {size=}"
        x = torch.randn(B, GROUPS * IN, *range(size, size + dims), dtype=torch.float64, requires_grad=True)
        weight = torch.randn(GROUPS * OUT, IN, *[window] * dims, dtype=torch.float64, requires_grad=True)
        out = convolution(x, weight, None, stride, padding, dilation, GROUPS)
        gradient = torch.randn_like(out)
        expected = torch.autograd.grad(out, [x, weight], gradient)
        how = [stride] * dims, [padding] * dims, [dilation] * dims, GROUPS
        of_x, of_weight = gradients(gradient, x.detach(), weight.detach(), *how)
        close(of_x, expected[0], 1e-12, what)
        if window == 1:
            close(of_weight, expected[1], 1e-12, what)
            close(convolve(x, weight, [stride] * dims, GROUPS), out, 1e-12, what)
        tried += 1
    assert tried > 60


def test_the_gradient_by_columns_is_torchs():
    for window, padding in product((2, 3, 5), (0, 1, 2)):
        if padding >= window:
            continue  # left to torch's own
        x = torch.randn(B, GROUPS * IN, 7, 8, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(GROUPS * OUT, IN, window, window, dtype=torch.float64)
        out = torch.conv2d(x, weight, None, 1, padding, 1, GROUPS)
        gradient = torch.randn_like(out)
        (expected,) = torch.autograd.grad(out, x, gradient)
        of_x = gradient_by_columns(gradient, weight, [padding] * 2, GROUPS)
        close(of_x, expected, 1e-12, f"{window=} {padding=}")


def test_a_trace_has_no_grouped_gradient_of_an_input_and_computes_the_same():
    def gradients_of(x, first, second):
        x, first, second = (tensor.detach().requires_grad_() for tensor in (x, first, second))
        inner = torch.conv2d(x, first, None, 2, 1, 1, GROUPS)
        return torch.autograd.grad(
            torch.conv2d(inner.relu(), second, None, 2, 0, 1, GROUPS).square().sum(), [x, first, second]
        )

    sizes = [(B, GROUPS * IN, 8, 8), (GROUPS * OUT, IN, 3, 3), (GROUPS * IN, OUT, 1, 1)]
    tensors = [torch.randn(size, dtype=torch.float64) for size in sizes]
    graph = make_fx(gradients_of, FOR_A_GPU, "fake")(*tensors)
    backward = torch.ops.aten.convolution_backward.default
    masks = [node.args[-1] for node in graph.graph.find_nodes(op="call_function", target=backward)]
    assert masks == [[False, True, False]]  # the first one's weight is torch's
    for mine, expected in zip(graph(*tensors), gradients_of(*tensors), strict=True):
        close(mine, expected, 1e-12, "traced")


@pytest.mark.parametrize(("channels", "apart"), [(IN, True), (16, False)])
def test_few_channels_are_taken_apart_and_many_are_not(channels, apart):
    def gradients_of(x, weight):
        x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
        return torch.autograd.grad(torch.conv2d(x, weight, None, 1, 1, 1, GROUPS).square().sum(), [x, weight])

    x = torch.randn(B, GROUPS * channels, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(GROUPS * OUT, channels, 5, 5).contiguous(memory_format=torch.channels_last)
    graph = make_fx(gradients_of, FOR_AVX512, "fake")(x, weight)
    backward = torch.ops.aten.convolution_backward.default
    masks = [node.args[-1] for node in graph.graph.find_nodes(op="call_function", target=backward)]
    assert masks == [[not apart, True, False]]
    for mine, expected in zip(graph(x, weight), gradients_of(x.double(), weight.double()), strict=True):
        close(mine.double(), expected, 1e-5, "float32")
