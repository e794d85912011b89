"""Embedding: vmap lets gradient into the row `padding_idx`, which must stay as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Pass
from ..unwrap import on_stacks

__all__ = ["RULES"]


def _embedding(
    mode: Pass,
    function: Any,
    args: tuple,
    kwargs: dict,
) -> Tensor:
    """One look-up in the M tables laid end to end, with the padding rows cut out of the gradient."""
    weight, indices, padding_idx, by_frequency, sparse = (*args, *(-1, False, False)[len(args) - 2 :])
    if kwargs or sparse:
        return function(*args, **kwargs)  # vmap's own error says that sparse gradients cannot be

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        weight, indices = stacks
        if not stacked[0]:
            weight = weight.expand(mode.num_models, *weight.shape)
        if not stacked[1]:
            indices = indices.expand(mode.num_models, *indices.shape)
        rows = weight.shape[1]
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < rows):
            raise IndexError(f"index out of range: the embedding has {rows} rows")  # else model m would read m+1's
        start = torch.arange(mode.num_models, device=indices.device) * rows
        flat = indices + start.view(-1, *[1] * (indices.dim() - 1))
        out = torch.embedding(weight.flatten(0, 1), flat, -1, by_frequency, False)
        if padding_idx >= 0:
            out = torch.where((indices == padding_idx).unsqueeze(-1), out.detach(), out)
        return (out,)

    return on_stacks(run, mode.index, [weight, indices])[0]


RULES = {torch.embedding: _embedding}
