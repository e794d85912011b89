"""How activations lie in memory: folded for fast convolutions, and in no other order than alone where that counts.

A pass folds only what has one memory format alone, so of a folded activation that order is known, and random masks are
drawn by it. A model's slice of what is made from one, such as a part of it, has gaps between its elements, which tells
it from any other. Whatever asks for its memory order then, or edits in place what shares its memory with others alone
and not here, raises `LayoutMatters`, and the pass is run again without folding. There, too, vmap may have to copy what
is a view alone, and a model that then edits one of the two in place runs in turn. So does one in channels_last of which
an activation's order is asked for: vmap does not keep it.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import WholeInTurn
from .registry import Pass

SHARES = "it edits a tensor in place that shares its memory with another one alone, and not here"


class LayoutMatters(Exception):
    """Something asked for the memory order of an activation that lies in another order than it has alone."""


def is_folded(stack: Tensor) -> bool:
    """Say whether `[M, B, C, H, W]` lies in memory as channels_last `[B, M * C, H, W]`."""
    if stack.dim() != 5 or not stack.numel():
        return False
    models, _, channels, height, width = stack.shape
    row = models * channels
    strides = (channels, height * width * row, 1, width * row, row)
    return all(size == 1 or have == want for size, have, want in zip(stack.shape, stack.stride(), strides, strict=True))


def is_channels_last(tensor: Tensor, stacked: bool) -> bool:
    """Say whether the channels of images or of a convolution's weight are next to each other in memory."""
    channels = 1 + stacked
    image = tensor.dim() > 3 + stacked and tensor.shape[channels] > 1
    return image and tensor.stride(channels) == 1 != tensor.stride(-1)


def has_gaps(tensor: Tensor) -> bool:
    """Say whether there is memory between a tensor's numbers that is not its own."""
    return not torch.ops.aten.is_non_overlapping_and_dense(tensor)


def row_alone(mode: Pass, stack: Tensor, stacked: bool) -> Tensor:
    """Return a tensor like one model's slice, in the memory order that it has alone, but perhaps with other numbers."""
    if not stacked:
        return stack
    row, known = stack[0], mode.folded is not None and is_folded(stack)
    if not known:
        check_format(mode, row)
    if not has_gaps(row) or (has_gaps(stack) and not mode.folded):
        return row
    if mode.folded and not known:
        raise LayoutMatters
    return torch.empty_like(row, memory_format=mode.folded or torch.preserve_format)


def check_format(mode: Pass, row: Tensor) -> None:
    """Refuse to ask for the memory order of what one model sees, where vmap may have lost it."""
    orders_differ = row.dim() > 2 and row.shape[1] > 1 and row.shape[2:].numel() > 1
    if mode.channels_last and orders_differ and not is_channels_last(row, False):
        refuse_layout(mode, "it asks for the memory order of an activation that may lie in channels_last alone")


def check_edit(mode: Pass, args: tuple) -> None:
    """Refuse to edit in place what was copied where alone it may be viewed, or the copy."""
    if isinstance(args[0], Tensor) and storage_of(args[0]) in mode.copies:
        refuse_layout(mode, SHARES)


def refuse_layout(mode: Pass, reason: str) -> NoReturn:
    """Have the pass run again without folding, or the whole model in turn if it runs so already."""
    raise LayoutMatters if mode.folded else WholeInTurn(reason)


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """Return what stands for the storage of a tensor, perhaps as one model sees it, without keeping its memory."""
    return StorageWeakRef(whole_of(tensor).untyped_storage())


def whole_of(tensor: Tensor) -> Tensor:
    """Return the tensor of all models that what one model sees is a view of, as it was made."""
    while functorch.is_batchedtensor(tensor) or functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor if tensor._base is None else tensor._base


def keeps_order(tensor: Tensor) -> bool:
    """Say whether what one model sees of a tensor lies in memory in its order, perhaps with gaps."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return strides == sorted(strides, reverse=True)
