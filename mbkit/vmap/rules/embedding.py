"""Embedding: vmap lets gradient into the row `padding_idx`, which must stay as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Pass, rule
from ..unwrap import call_unwrapped, expanded


@rule(torch.embedding)
def _embedding(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """One look-up in the M tables laid end to end, with the padding rows cut out of the gradient."""
    weight, indices, padding_idx, by_frequency, sparse = (*args, *(-1, False, False)[len(args) - 2 :])
    if kwargs or sparse:
        return NotImplemented  # vmap's own error says that sparse gradients cannot be

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        weight, indices = expanded(mode, stacks, stacked)
        rows = weight.shape[1]
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < rows):
            raise IndexError(f"index out of range: the embedding has {rows} rows")  # else model m would read m+1's
        start = torch.arange(mode.num_models, device=indices.device) * rows
        flat = indices + start.view(-1, *[1] * (indices.dim() - 1))
        out = torch.embedding(weight.flatten(0, 1), flat, -1, by_frequency, False)
        if padding_idx >= 0:
            out = torch.where((indices == padding_idx).unsqueeze(-1), out.detach(), out)
        return out

    return call_unwrapped(mode, run, [weight, indices])
