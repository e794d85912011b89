"""Reads of Python values from tensors, and tensors made from nothing, as M models see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .physical import on_stacks, stack_alike
from .settings import agreed

if TYPE_CHECKING:
    from .interception import Interception

__all__ = ["RULES"]


def _value(mode: Interception, function: Any, args: tuple, kwargs: dict) -> Any:
    """`item`, `float`, `bool`, `tolist`: one Python value when all models have the same, an error otherwise."""
    values: list[Any] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        x = stacks[0]
        values.extend(function(row, *args[1:], **kwargs) for row in (x if stacked[0] else [x]))
        return (torch.zeros(mode.num_models, device=x.device),)

    on_stacks(run, mode.index, args[:1])
    return agreed(values, f"what {function.__name__.strip('_')}() reads from a tensor")


def _requires_grad(mode: Interception, function: Any, args: tuple, kwargs: dict) -> bool:
    """vmap hides `requires_grad`; a model that branches on it alone must branch the same way here."""
    answer: list[bool] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        answer.append(stacks[0].requires_grad)
        return (torch.zeros(mode.num_models, device=stacks[0].device),)

    on_stacks(run, mode.index, args)
    return answer[0]


def _data(mode: Interception, function: Any, args: tuple, kwargs: dict) -> Tensor:
    """`x.data` is refused by vmap; `detach()` reads and edits the same memory."""
    return args[0].detach()


def _made(mode: Interception, function: Any, args: tuple, kwargs: dict) -> Tensor:
    """A tensor made from nothing gets one copy a model, so that each can fill its own in place."""

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor]:
        x = stacks[0]
        return (x if stacked[0] else stack_alike([x] * mode.num_models),)

    return on_stacks(run, mode.index, [function(*args, **kwargs)])[0]


_READS = "item tolist __bool__ __float__ __int__ __index__ __complex__".split()
_MADE = "empty zeros ones full empty_like zeros_like ones_like full_like empty_strided".split()
_NEW = "new_empty new_zeros new_ones new_full".split()

RULES = {getattr(Tensor, name): _value for name in _READS}
RULES |= {getattr(torch, name): _made for name in _MADE}
RULES |= {getattr(Tensor, name): _made for name in _NEW}
RULES[Tensor.requires_grad.__get__] = _requires_grad
RULES[Tensor.data.__get__] = _data
