"""Gradient clipping by norm, each model by its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import per_model


def norm_limits(max_norm: float | Sequence[float], num_models: int) -> list[float]:
    """Return M largest norms from one number or M.

    Raises:
        TypeError: one that is not a number.
        ValueError: another number of norms than models; one that is 0, negative or NaN.

    Example:
        >>> norm_limits(1.0, 2)
        [1.0, 1.0]
    """
    limits = per_model(list(max_norm) if isinstance(max_norm, tuple) else max_norm, num_models, "norms")
    for m, limit in enumerate(limits):
        if isinstance(limit, bool) or not isinstance(limit, (int, float)):
            raise TypeError(f"Expected a number as max_norm of model {m}, got {limit!r}: pass a number like 1.0.")
        if not limit > 0:  # NaN as well
            raise ValueError(f"Expected positive norms, got {max_norm}: choose a larger max_norm.")
    return limits


def clip_by_norm_(grads: Sequence[Tensor], limits: Sequence[float], norm_type: float) -> Tensor:
    """Scale each model's gradients so that their common norm does not exceed its limit, and return the norms `[M]`.

    Follows `torch.nn.utils.clip_grad_norm_`, its 1e-6 included. A norm that is not finite spoils its own model's
    gradients, as it does alone, and no other's.

    Args:
        grads: the stacked gradients `[M, ...]`, changed in place.
        limits: the M largest norms.
        norm_type: the p of the p-norm.
    """
    # The extra dimension lets a parameter of one number, [M], flatten to [M, 1].
    norms = [torch.linalg.vector_norm(g.unsqueeze(-1).flatten(1), norm_type, dim=1) for g in grads]
    total = torch.linalg.vector_norm(torch.stack(norms, dim=1), norm_type, dim=1)  # [M]
    scale = (torch.tensor(limits, dtype=total.dtype, device=total.device) / (total + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))
    return total
