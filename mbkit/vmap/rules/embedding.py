"""Embedding: vmap lets gradient into the row `padding_idx`, which must stay as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Pass, rule
from ..unwrap import call_unwrapped, expanded
from .data_dependent import all_true


@rule(torch.embedding)
def _embedding(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """One look-up in the M tables laid end to end, with the padding rows cut out of the gradient."""
    weight, indices, padding_idx, by_frequency, sparse = (*args, *(-1, False, False)[len(args) - 2 :])
    if kwargs or sparse:
        return NotImplemented  # vmap's own error says that sparse gradients cannot be

    rows = weight.shape[0]
    if not all_true(mode, (indices >= 0) & (indices < rows)):
        raise IndexError(f"index out of range: the embedding has {rows} rows")  # else model m would read m+1's

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        weight, indices = expanded(mode, stacks, stacked)
        start = torch.arange(mode.num_models, device=indices.device) * rows
        within = indices.clamp(0, rows - 1) if mode.traced else indices  # a compiled step asks only when it has run
        flat = within + start.view(-1, *[1] * (indices.dim() - 1))
        out = torch.embedding(weight.flatten(0, 1), flat, -1, by_frequency, False)
        if padding_idx >= 0:
            out = torch.where((indices == padding_idx).unsqueeze(-1), out.detach(), out)
        return out

    return call_unwrapped(mode, run, [weight, indices])
