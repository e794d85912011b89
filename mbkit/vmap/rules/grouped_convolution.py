"""The gradient of a grouped convolution's input, where torch's own is slow. A group is one model's share, here.

On a GPU cuDNN starts kernels for each group. But this gradient is itself a grouped convolution, of the output's
gradient with the weights turned around, and that is one kernel; with windows of 1 all is a product of matrices.
On a CPU a model with few channels fills a part of each vector. With a window's columns as channels it fills all, if
their sum costs little, since the compiler joins it with what follows. Two columns at once, with windows wider by one,
fill twice as much, which is faster with AVX-512; with AVX2's shorter vectors torch's way mostly is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, backends
from torch.nn.functional import pad

from ..registry import Pass, rule
from ..unwrap import call_unwrapped

_CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_HALF = 8  # the numbers in half a vector of AVX-512
_Input = Callable[..., Tensor]  # the output's gradient, the weight, the input's shape and the settings -> the input's


class _Convolution(torch.autograd.Function):
    """A convolution whose input gets its gradient from a function."""

    @staticmethod
    def forward(ctx: Any, of_input: _Input, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.of_input, ctx.how, ctx.sizes = of_input, how, None if bias is None else list(bias.shape)
        return _CONVOLUTIONS[x.dim() - 2](x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.how
        _, wanted, *others = ctx.needs_input_grad[:4]
        of_x = ctx.of_input(gradient, weight, x.shape, *ctx.how) if wanted else None
        settings = stride, padding, dilation, False, [0] * len(stride), groups
        given = gradient, x, weight, ctx.sizes, *settings, [False, *others]
        rest = torch.ops.aten.convolution_backward(*given)[1:] if any(others) else (None, None)
        return None, of_x, *rest, *[None] * 4


def on_a_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """Return a grouped convolution of `[B, groups * C, ...]`; stride, padding and dilation are tuples."""
    stride, padding, dilation, groups = how
    unseen = any(p > r for p, r in zip(padding, _reach(weight, dilation), strict=True))
    if unseen or groups == x.shape[1]:  # torch has a kernel for one channel each
        return _CONVOLUTIONS[x.dim() - 2](x, weight, bias, *how)
    if weight[0, 0].numel() > 1:
        return _Convolution.apply(_turned_around, x, weight, bias, *how)
    seen = x[(..., *(slice(None, None, s) for s in stride))]
    out = torch.bmm(weight.view(groups, -1, weight.shape[1]), seen.unflatten(1, (groups, -1)).movedim(0, 2).flatten(2))
    out = out.view(groups, -1, len(x), *seen.shape[2:]).movedim(2, 0).flatten(1, 2)
    return out if bias is None else out + bias.view(-1, *[1] * len(stride))


def on_a_cpu(traced: bool, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """Return a grouped convolution of channels_last `[B, groups * C, H, W]`, in a step that is compiled if `traced`."""
    stride, padding, dilation, groups = how
    _, channels, height, width = weight.shape
    plain = groups > 1 and {*stride, *dilation} == {1} and padding[0] < height and padding[1] < width
    pays = channels * width > _HALF if traced else weight.shape[0] // groups % (2 * _HALF) == 0
    if plain and pays and channels <= _HALF and x.requires_grad and backends.cpu.get_cpu_capability() == "AVX512":
        return _Convolution.apply(_by_columns if traced else _two_columns_at_once, x, weight, bias, *how)
    return torch.conv2d(x, weight, bias, *how)


def _turned_around(gradient: Tensor, weight: Tensor, shape: torch.Size, *how: Any) -> Tensor:
    stride, padding, dilation, groups = how
    reach = _reach(weight, dilation)
    for dim, (step, size, p, r) in enumerate(zip(stride, shape[2:], padding, reach, strict=True), start=2):
        after = (0, 0) * (gradient.dim() - 1 - dim)  # zeros stand where no window begins
        gradient = pad(gradient.unsqueeze(dim + 1), (*after, 0, step - 1)).flatten(dim, dim + 1)
        gradient = pad(gradient, (*after, 0, size + 2 * p - r - gradient.shape[dim]))
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip([*range(2, weight.dim())])
    around = [r - p for r, p in zip(reach, padding, strict=True)]
    return _CONVOLUTIONS[len(stride)](gradient, turned, None, 1, around, dilation, groups)


def _by_columns(gradient: Tensor, weight: Tensor, shape: torch.Size, *how: Any) -> Tensor:
    """Compute each column's share of a window in one convolution; inductor joins their sum with what follows."""
    _, padding, _, groups = how
    _, channels, height, width = weight.shape
    window = weight.unflatten(0, (groups, -1)).flip(3).permute(0, 4, 2, 1, 3).flatten(0, 2).unsqueeze(-1)
    window = window.contiguous(memory_format=torch.channels_last)
    shares = torch.conv2d(gradient, window, None, 1, (height - 1 - padding[0], 0), 1, groups)
    shares = shares.unflatten(1, (groups, width, channels)).movedim(2, 0)  # [width, B, groups, channels, H, W]
    moved = [pad(share, (n - padding[1], width - 1 - padding[1] - n)) for n, share in enumerate(shares)]
    return sum(moved[1:], moved[0]).flatten(1, 2)


def _two_columns_at_once(gradient: Tensor, weight: Tensor, shape: torch.Size, *how: Any) -> Tensor:
    """Convolve with windows that are wider by one and step over two columns, each column with its own weights."""
    _, padding, _, groups = how
    above, left = (size - 1 - p for size, p in zip(weight.shape[2:], padding, strict=True))
    if shape[3] % 2:
        gradient = pad(gradient, (0, 1)).contiguous(memory_format=torch.channels_last)
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flip(3, 4)
    windows = torch.stack([pad(turned, (0, 1)), pad(turned, (1, 0))], 1).flatten(0, 2)
    windows = windows.contiguous(memory_format=torch.channels_last)
    pairs = torch.conv2d(gradient, windows, None, (1, 2), (above, left), 1, groups).unflatten(1, (groups, 2, -1))
    return pairs.permute(0, 4, 5, 2, 1, 3).flatten(4).flatten(2, 3)[:, :, : shape[3]].permute(0, 3, 1, 2)


def _reach(weight: Tensor, dilation: Sequence[int]) -> list[int]:
    """Return how far a window reaches beyond its first number."""
    return [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]


def settings_of(args: tuple, dims: int) -> tuple[Tensor | None, list[Any]]:
    """Return a convolution's bias, and its stride, padding (or its name) and dilation as tuples, and its groups."""
    bias, *how, groups = (*args, *(None, 1, 0, 1, 1)[len(args) :])
    how = [(v,) * dims if isinstance(v, int) else v if isinstance(v, str) else tuple(v) * (dims // len(v)) for v in how]
    return bias, [*how, groups]


def in_order(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation=1, groups=1) -> Any:
    return (input, weight, bias, stride, padding, dilation, groups), {}


@rule(torch.conv1d, torch.conv3d, order=in_order)
def conv_on_a_gpu(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """M models' convolutions as one of M times the groups."""
    x, weight, *rest = args
    dims = weight.dim() - 2
    if mode.device.type != "cuda" or mode.num_models == 1 or kwargs:
        return NotImplemented
    bias, (*how, groups) = settings_of(tuple(rest), dims)

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        x, weight, *biases = stacks
        if not all(stacked) or x.dim() != dims + 3 or isinstance(how[1], str):
            return NotImplemented
        x = x.transpose(0, 1).flatten(1, 2)
        bias = biases[0].flatten() if biases else None
        out = on_a_gpu(x, weight.flatten(0, 1), bias, *how, groups * mode.num_models)
        return out.unflatten(1, (mode.num_models, -1)).transpose(0, 1)

    return call_unwrapped(mode, run, [x, weight] if bias is None else [x, weight, bias])
