"""How the steps of a run are made: one object for `fit`, its steps and their strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..batch.loss_settings import LossSettings
from ..batch.targets import TargetForms
from ..common.checks import flag, whole_number
from ..vmap import check_autocast
from .loop import own_targets, stacked_shape


@dataclass(frozen=True)
class StepOptions:
    """What all steps of a run have in common; the fields are `fit`'s arguments of the same names.

    Attributes:
        forms: which of the targets are one for all models, told in the first step and held for the run.

    Raises:
        TypeError, ValueError: `chunk_size` is not "auto", None or a positive whole number; `shared_targets` is not
            True, False or None; `compile` is not True or False; `autocast` is not torch.bfloat16 or None.

    Example:
        >>> from torch import nn
        >>> StepOptions(nn.functional.mse_loss, chunk_size=0)
        Traceback (most recent call last):
        ValueError: Expected at least 1 as chunk_size (or 'auto', or None), got 0: pass 1 or more.
    """

    loss_fn: Callable[..., Tensor]
    max_norm: float | Sequence[float] | None = None
    shared_targets: bool | TargetForms | None = None
    on_nonfinite: str | None = None
    chunk_size: int | str | None = "auto"
    compile: bool = False
    loss_settings: Mapping[str, Any] | None = None
    autocast: torch.dtype | None = None
    forms: TargetForms = field(init=False, repr=False)

    def settings_of(self, num_models: int) -> LossSettings:
        """Return the loss function's settings for M models."""
        object.__setattr__(self, "loss_settings", LossSettings.made_of(self.loss_settings, self.loss_fn, num_models))
        return self.loss_settings

    def loss_of_model(self, m: int, num_models: int) -> Callable[[Any, Any], Tensor]:
        """Return the loss function for the outputs of one of M models and the targets of all."""
        settings = self.settings_of(num_models)
        own = settings.of_model(m)

        def loss(outputs: Any, targets: Any) -> Tensor:
            settings.check_outputs(stacked_shape(outputs, num_models))
            return self.loss_fn(outputs, own_targets(targets, outputs, m, num_models, self.forms), **own)

        return loss

    def __post_init__(self) -> None:
        object.__setattr__(self, "forms", TargetForms.made_of(self.shared_targets))
        check_autocast(self.autocast)
        flag(self.compile, "compile")
        if self.chunk_size is not None and self.chunk_size != "auto":
            whole_number(self.chunk_size, "chunk_size (or 'auto', or None)")
