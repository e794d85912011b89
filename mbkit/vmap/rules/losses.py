"""Cross-entropy with class labels: M models' rows as one batch, where vmap decomposes it into a dozen operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..per_model import PerModel
from ..registry import RULES_WITH_SETTINGS, Pass, rule
from ..unwrap import call_unwrapped

_NONE, _MEAN = 0, 1  # of torch's own numbers for reductions


@rule(torch._C._nn.cross_entropy_loss)
@rule(torch._C._nn.cross_entropy_loss, table=RULES_WITH_SETTINGS)
def _cross_entropy(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """Row by row the kernels are those of a lone model; only the mean over a model's rows is taken here."""
    outputs, labels, weight, reduction, ignored, smoothing = (*args, None, _MEAN, -100, 0.0)[:6]
    if kwargs or weight is not None or outputs.dim() != 2 or labels.dim() != 1:
        return NotImplemented

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        outputs, labels = stacks
        if not stacked[0] or labels.is_floating_point():
            return NotImplemented
        labels = labels if stacked[1] else labels.expand(mode.num_models, -1)
        plain = 0.0 if isinstance(smoothing, PerModel) else smoothing
        rows = operator(outputs.flatten(0, 1), labels.flatten(), None, _NONE, ignored, plain)
        rows = rows.view(mode.num_models, -1)
        if isinstance(smoothing, PerModel):  # between none and all of it, which may be infinite
            smooth = operator(outputs.flatten(0, 1), labels.flatten(), None, _NONE, ignored, 1.0).view_as(rows)
            shares = torch.tensor(smoothing.values, dtype=rows.dtype, device=rows.device)[:, None]
            rows = torch.where(shares == 0, rows, (1 - shares) * rows + shares * smooth)
        if reduction == _NONE:
            return rows
        return rows.sum(1) / (labels != ignored).sum(1) if reduction == _MEAN else rows.sum(1)

    return call_unwrapped(mode, run, [outputs, labels])
