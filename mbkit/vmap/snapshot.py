"""Whether a tensor is where it was, and whether somebody watches its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["has_grad_hooks", "place"]


def has_grad_hooks(tensor: Tensor) -> bool:
    """Say whether a stacked tensor has hooks on its gradient, which only the whole batch's backward pass runs."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def place(tensor: Tensor) -> tuple:
    """Return where a tensor is, in which form, whether it is trained, and whether somebody watches its gradient."""
    strided = (tensor.data_ptr(), tensor.stride()) if tensor.layout is torch.strided else ()
    return strided, tensor.shape, tensor.dtype, tensor.requires_grad, has_grad_hooks(tensor)
