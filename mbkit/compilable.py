"""What a step must not hold to be compiled."""

from __future__ import annotations

from typing import Any

from torch import nn

from .operators import HOOKS, is_watched, named_modules
from .optim.stacked import StackedOptimizer

__all__ = ["CannotCompile", "check_module", "check_step"]


class CannotCompile(RuntimeError):
    """The step holds something that a graph of operators cannot hold."""


def check_step(batch: Any, optimizer: Any) -> None:
    """Raise CannotCompile at what may change from step to step."""
    if type(optimizer) is not StackedOptimizer:
        raise CannotCompile(f"{getattr(optimizer, 'optimizer_cls', type(optimizer)).__name__} has no stacked rule")
    if batch._frozen is not None:
        raise CannotCompile("a model is frozen")
    if batch.model_by_model:
        raise CannotCompile(f"{sorted(batch.model_by_model)} run model by model")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise CannotCompile("the optimizer has hooks")


def check_module(template: nn.Module) -> None:
    """Raise CannotCompile at what a look at the module shows."""
    if any(p.is_complex() for p in template.parameters()):
        raise CannotCompile("a parameter is complex")
    if any(map(is_watched, template.parameters())):
        raise CannotCompile("a parameter has hooks")
    for path, module in named_modules(template):
        if any(vars(module)[hooks] for hooks in HOOKS):
            raise CannotCompile(f"'{path}' ({type(module).__name__}) has hooks")
