"""Cross-entropy with class labels: M models' rows as one batch, where vmap decomposes it into a dozen operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..per_model import PerModel
from ..registry import RULES_WITH_SETTINGS, Pass, rule
from ..unwrap import call_unwrapped
from .linear import VECTOR

_NONE, _MEAN = 0, 1  # of torch's own numbers for reductions


@rule(torch._C._nn.cross_entropy_loss)
@rule(torch._C._nn.cross_entropy_loss, table=RULES_WITH_SETTINGS)
def _cross_entropy(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """Row by row the numbers are those of a lone model; only the mean over a model's rows is taken here.

    A CPU's kernel for rows shorter than a vector takes the numbers one by one. The kernel for images, which has the
    classes in another dimension than the last, takes many rows at once, and computes the same to rounding.
    """
    outputs, labels, weight, reduction, ignored, smoothing = (*args, None, _MEAN, -100, 0.0)[:6]
    if kwargs or weight is not None or outputs.dim() != 2 or labels.dim() != 1:
        return NotImplemented

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        outputs, labels = stacks
        if not stacked[0] or labels.is_floating_point():
            return NotImplemented
        counts = (labels != ignored).sum(-1)
        labels, plain = labels.expand(mode.num_models, -1), 0.0 if isinstance(smoothing, PerModel) else smoothing
        if outputs.shape[-1] < VECTOR and outputs.is_cpu and not mode.traced:
            outputs = outputs.transpose(1, 2)
        else:
            outputs, labels = outputs.flatten(0, 1), labels.flatten()
        rows = operator(outputs, labels, None, _NONE, ignored, plain).view(mode.num_models, -1)
        if isinstance(smoothing, PerModel):  # between none and all of it, which may be infinite
            smooth = operator(outputs, labels, None, _NONE, ignored, 1.0).view_as(rows)
            shares = torch.tensor(smoothing.values, dtype=rows.dtype, device=rows.device)[:, None]
            rows = torch.where(shares == 0, rows, (1 - shares) * rows + shares * smooth)
        if reduction == _NONE:
            return rows
        return rows.sum(1) / counts if reduction == _MEAN else rows.sum(1)

    return call_unwrapped(mode, run, [outputs, labels])
