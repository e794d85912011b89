"""Grouped convolutions in a step that is compiled, by operators that are faster than the libraries' own.

A group is a model here. On a GPU cuDNN starts kernels for each group to get the input's gradient; but this is itself a
grouped convolution, of the output's gradient with the weights turned around, which is one kernel. A convolution with a
window of 1 is a product of matrices. On a CPU a model with few channels fills a part of each vector; by taking a
window's columns for channels, all of it is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["FOR_AVX512", "FOR_A_GPU", "convolve", "gradient_by_columns", "gradients", "parts_for"]

aten = torch.ops.aten
_FEW = 8  # channels, half of AVX-512's vector of float32; in AVX2's 6 channels leave little empty
_CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def convolve(x: Tensor, weight: Tensor, stride: Sequence[int], groups: int) -> Tensor:
    """Return a convolution with windows of 1, of `[B, groups * C, ...]`, as one product for each group."""
    x = x[(..., *(slice(None, None, s) for s in stride))]
    out = torch.bmm(weight.view(groups, -1, weight.shape[1]), _by_group(x, groups))
    return out.view(groups, -1, len(x), *x.shape[2:]).movedim(2, 0).flatten(1, 2)


def gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of a convolution's input and, where its windows are of 1, of its weight, by its output's."""
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip([*range(2, weight.dim())])
    if _is_product(weight, padding):
        seen = x[(..., *(slice(None, None, s) for s in stride))]
        of_weight = torch.bmm(_by_group(gradient, groups), _by_group(seen, groups).transpose(1, 2)).view_as(weight)
        return _spread(convolve(gradient, turned, [], groups), stride, x.shape[2:]), of_weight
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    sizes = [size + 2 * p - r for size, p, r in zip(x.shape[2:], padding, reach, strict=True)]
    around = [r - p for r, p in zip(reach, padding, strict=True)]
    spread = _spread(gradient, stride, sizes)
    return _CONVOLUTIONS[len(stride)](spread, turned, None, 1, around, dilation, groups), None


def gradient_by_columns(gradient: Tensor, weight: Tensor, padding: Sequence[int], groups: int) -> Tensor:
    """Return the gradient of the input of a two-dimensional convolution of stride 1, channels_last.

    For each column of the window its share is computed, in one convolution with a column as its window. The shares are
    added up in a loop that inductor joins with what follows.
    """
    _, channels, height, width = weight.shape
    window = weight.unflatten(0, (groups, -1)).flip(3).permute(0, 4, 2, 1, 3).flatten(0, 2).unsqueeze(-1)
    window = window.contiguous(memory_format=torch.channels_last)
    shares = torch.conv2d(gradient, window, None, 1, (height - 1 - padding[0], 0), 1, groups)
    shares = shares.unflatten(1, (groups, width, channels)).movedim(2, 0)  # [width, B, groups, channels, H, W]
    moved = [pad(share, (n - padding[1], width - 1 - padding[1] - n)) for n, share in enumerate(shares)]
    return sum(moved[1:], moved[0]).flatten(1, 2)


def _spread(x: Tensor, stride: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Return a tensor of these sizes that has `x` at each place of the stride, and else zeros."""
    for dim, (step, size) in enumerate(zip(stride, sizes, strict=True), start=2):
        after = (0, 0) * (x.dim() - 1 - dim)
        x = pad(x.unsqueeze(dim + 1), (*after, 0, step - 1)).flatten(dim, dim + 1)
        x = pad(x, (*after, 0, size - x.shape[dim]))
    return x


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Return `[B, groups * C, ...]` as `[groups, C, B * ...]`."""
    return x.unflatten(1, (groups, -1)).movedim(0, 2).flatten(2)


def _is_product(weight: Tensor, padding: Sequence[int]) -> bool:
    return weight[0, 0].numel() == 1 and not any(padding)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    stride, padding, _, transposed, _, groups = how
    if groups == 1 or transposed or not _is_product(weight, padding):
        return NotImplemented
    out = convolve(x, weight, stride, groups)
    return out if bias is None else out + bias.view(-1, *[1] * len(stride))


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, bias: Any, *how: Any) -> tuple:
    stride, padding, dilation, transposed, _, groups, wanted = how
    unseen = any(p > d * (k - 1) for p, d, k in zip(padding, dilation, weight.shape[2:], strict=True))
    if groups in (1, x.shape[1]) or transposed or not wanted[0] or unseen:  # one channel each: torch has a kernel
        return NotImplemented
    of_x, of_weight = gradients(gradient, x, weight, stride, padding, dilation, groups)
    if of_weight is None:
        return of_x, *aten.convolution_backward(gradient, x, weight, bias, *how[:-1], [False, *wanted[1:]])[1:]
    return of_x, of_weight, gradient.sum([0, *range(2, x.dim())]) if wanted[2] else None


def _few_channels_backward(gradient: Tensor, x: Tensor, weight: Tensor, bias: Any, *how: Any) -> tuple:
    stride, padding, dilation, transposed, _, groups, wanted = how
    plain = x.dim() == 4 and {*stride, *dilation} == {1} and not transposed and x.dtype is torch.float32
    few = groups > 1 and weight.shape[1] <= _FEW < weight.shape[1] * weight.shape[3]
    unseen = any(p >= k for p, k in zip(padding, weight.shape[2:], strict=True))
    if not (plain and few and wanted[0]) or unseen or not x.is_contiguous(memory_format=torch.channels_last):
        return NotImplemented
    rest = aten.convolution_backward(gradient, x, weight, bias, *how[:-1], [False, *wanted[1:]])
    return gradient_by_columns(gradient, weight, padding, groups), *rest[1:]


def parts_for(tensor: Tensor) -> dict[Any, Callable[..., Any]]:
    """Return by what the operators of a step are replaced where this tensor is; NotImplemented leaves one as it is."""
    if tensor.is_cuda:
        return FOR_A_GPU
    return FOR_AVX512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}


FOR_A_GPU: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
FOR_AVX512: dict[Any, Callable[..., Any]] = {aten.convolution_backward.default: _few_channels_backward}
