"""Normalisations inside torch.func: vmap's own rules lose a part of the second derivatives, without a word.

The gradient of a weight depends on the mean and the deviation of what is normalised, which they take for constants.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import BatchingError
from ..registry import RULES_INSIDE, Pass, rule


@rule(torch.layer_norm, torch.batch_norm, torch.instance_norm, table=RULES_INSIDE)
def _normalization(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """Leave them to the models one after the other: alone, torch loses some as well, for torch.func.jvp."""
    weight, by_its_input = (args[2], True) if operator is torch.layer_norm else (args[1], args[5])
    if weight is not None and by_its_input:
        raise BatchingError("torch.vmap takes wrong derivatives of a normalisation's weight inside torch.func")
    return NotImplemented
