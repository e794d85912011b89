"""Whether a tensor is where it was and holds what it held, and whether somebody watches its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_grad_hooks(tensor: Tensor) -> bool:
    """Say whether a stacked tensor has hooks on its gradient, which only the whole batch's backward pass runs."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def place(tensor: Tensor) -> tuple:
    """Return where a tensor is, in which form, whether it is trained, and whether somebody watches its gradient."""
    strided = (tensor.data_ptr(), tensor.stride()) if tensor.layout is torch.strided else ()
    return strided, tensor.shape, tensor.dtype, tensor.requires_grad, has_grad_hooks(tensor)


def version(value: Any) -> int | bytes:
    """Return what changes with the numbers in a tensor or an array; some of torch's kernels do not count it up."""
    if not isinstance(value, Tensor):
        return value.tobytes()
    return 0 if value.is_inference() else value._version
