"""Linear layers: one batched product for M models, where vmap's own rule takes several operators and copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Pass
from ..unwrap import on_stacks

__all__ = ["RULES"]


def _linear(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Tensor:
    x, weight, bias = (*args, None)[:3] if not kwargs else (None, None, None)
    if bias is None or x.dim() < 2:
        return function(*args, **kwargs)
    plan: list[bool] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        x, weight, bias = stacks
        if not (stacked[1] and stacked[2] and weight.dim() == 3):
            return (mode.index_values,)
        plan.append(True)
        x = x if stacked[0] else x.expand(mode.num_models, *x.shape)
        out = torch.baddbmm(bias.unsqueeze(1), x.flatten(1, -2), weight.transpose(1, 2))
        return (out.unflatten(1, x.shape[1:-1]) if x.dim() > 3 else out,)

    out = on_stacks(run, mode.index, [x, weight, bias])[0]
    return out if plan else function(*args, **kwargs)


RULES = {torch._C._nn.linear: _linear}
