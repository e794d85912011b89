"""Edits in place that vmap gets wrong: it makes some row by row, and others change what lies around the rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import BatchingError
from ..registry import Pass, rule
from ..unwrap import as_stacked

_NAMES = "pow hypot ldexp float_power cumprod addbmm index_reduce".split()
_PLAIN = {Tensor.__ipow__: Tensor.pow} | {getattr(Tensor, f"{name}_"): getattr(Tensor, name) for name in _NAMES}


@rule(*_PLAIN)
def _edit(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """Copy the result in: row by row, each edit would count as one of what the others keep for the backward pass."""
    x, *rest = args
    return NotImplemented if as_stacked(x) is None else x.copy_(_PLAIN[operator](x.clone(), *rest, **kwargs))


@rule(Tensor.as_strided_, Tensor.resize_, Tensor.resize_as_)
def _move(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    if as_stacked(args[0]) is None:
        return NotImplemented
    raise BatchingError(f"{operator.__name__} changes where a tensor lies, among those of other models")
