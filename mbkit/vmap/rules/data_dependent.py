"""Reads of Python values from tensors, and tensors made from nothing, as M models see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BatchingError
from ..per_model import agreed
from ..registry import RULES_INSIDE, RULES_WHEN_TRACED, Pass, rule
from ..unwrap import call_unwrapped, expanded, stack_alike


def _methods(names: str) -> list[Any]:
    return [getattr(Tensor, name) for name in names.split()]


@rule(*_methods("item tolist __bool__ __float__ __int__ __index__ __complex__"))
def _value(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """One Python value when all models have the same, an error otherwise."""

    def run(stacks: list[Tensor], stacked: list[bool]) -> list[Any]:
        return [operator(row, *args[1:], **kwargs) for row in (stacks[0] if stacked[0] else stacks)]

    values = call_unwrapped(mode, run, args[:1])
    return agreed(values, f"what {operator.__name__.strip('_')}() reads from a tensor")


@rule(torch._is_all_true, table=RULES_WHEN_TRACED)
def _valid(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> bool:
    """What torch.distributions asks before it raises."""
    return all_true(mode, args[0])


def all_true(mode: Pass, condition: Tensor) -> bool:
    """Say whether a condition, which one model sees, holds for all models and all numbers.

    A traced step has no numbers: it takes the condition for true, and asks when it runs.
    """
    ask = mode.streams.assume if mode.traced else lambda stack: bool(stack.all())
    return call_unwrapped(mode, lambda stacks, _: ask(stacks[0]), [condition])


@rule(Tensor.data.__get__)
def _data(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """`x.data` is refused by vmap; it is the same memory, and edits of it do not count for autograd."""
    return call_unwrapped(mode, lambda stacks, stacked: expanded(mode, [stacks[0].data], stacked)[0], args)


@rule(Tensor.grad.__get__)
@rule(Tensor.grad.__get__, table=RULES_INSIDE)
def _gradient(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """`x.grad` would read as None."""
    if mode.reads_gradients:
        return NotImplemented
    raise BatchingError("forward reads .grad, which one model alone cannot be given here: pass what it needs as input")


@rule(
    *(getattr(torch, name) for name in "empty zeros ones full empty_like zeros_like ones_like full_like".split()),
    torch.empty_strided,
    *_methods("new_empty new_zeros new_ones new_full"),
)
def _made(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    """A tensor made from nothing gets one copy per model, so that each can fill its own in place."""
    tracked = kwargs.pop("requires_grad", False)
    made = operator(*args, **kwargs)
    if operator is torch.full_like and not (made.dtype.is_floating_point or made.dtype.is_complex):
        return made  # a bound or a default in what all models share, such as T5's distances between positions

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        return (stacks[0] if stacked[0] else stack_alike(stacks * mode.num_models)).requires_grad_(tracked)

    return call_unwrapped(mode, run, [made])
