"""PReLU: vmap's own rule leaves out a sum in the second derivative where all models share the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Pass
from ..unwrap import on_stacks

__all__ = ["RULES"]


def _prelu(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Tensor:
    """A shared input is laid out for each model, without a copy."""

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        x = stacks[0]
        return (x if stacked[0] else x.expand(mode.num_models, *x.shape),)

    x, *rest = args
    return function(on_stacks(run, mode.index, [x])[0], *rest, **kwargs)


RULES = {torch.prelu: _prelu}
