"""The rule of last resort: run the operator for one model after the other, with that model's own random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .errors import BatchingError
from .per_model import PerModel
from .registry import Pass
from .rules.convolution import check_order
from .unwrap import on_stacks, stack_alike

__all__ = ["edits_in_place", "model_by_model"]


_NOT_EDITS = ("__init__", "__int__", "__index__", "__iter__", "__invert__")


def edits_in_place(function: Any) -> bool:
    """Say whether an operator changes its first argument, which torch marks by a trailing underscore."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return (name.startswith("__i") and name not in _NOT_EDITS) or name == "__setitem__"
    return name.endswith("_")


def model_by_model(mode: Pass, function: Any, args: tuple, kwargs: dict) -> Any:
    """Call `function` M times, once on each model's slice of the tensors and settings, and stack the results.

    Exact for every operator (the same kernel runs on the same numbers, in the same layout), and no faster
    than a loop over the models.
    """
    if kwargs.get("out") is not None:
        raise BatchingError("out= is not supported here: assign the result instead")
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    in_place = edits_in_place(function)
    results: list[Any] = []  # the leaves and structure of model 0's result, filled in below vmap

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor, ...]:
        if in_place and not (stacked and stacked[0]):
            raise BatchingError(
                "a tensor that all models share is edited in place, with other values for each model: copy it first"
            )
        check_order(mode, stacks, stacked)
        outputs = []
        generator = kwargs.get("generator")  # one that each model makes for itself: all draw the same from it
        start = generator.get_state() if generator is not None else None
        with mode.streams.take_turns(mode.device) as turns:
            for m in turns:
                if generator is not None:
                    generator.set_state(start)
                own = [leaf.values[m] if isinstance(leaf, PerModel) else leaf for leaf in leaves]
                for place, stack, is_stacked in zip(places, stacks, stacked, strict=True):
                    own[place] = stack[m] if is_stacked else stack
                own_args, own_kwargs = tree_unflatten(own, spec)
                flat, result_spec = tree_flatten(function(*own_args, **own_kwargs))
                outputs.append(flat)
        results.extend([outputs[0], result_spec])
        if in_place:
            return (torch.zeros(mode.num_models, device=stacks[0].device),)  # vmap wants a tensor; nobody reads it
        return tuple(
            stack_alike([flat[i] for flat in outputs]) for i, leaf in enumerate(outputs[0]) if isinstance(leaf, Tensor)
        )

    stacked_outputs = iter(on_stacks(run, mode.index, [leaves[i] for i in places]))
    if in_place:
        return args[0]
    flat, result_spec = results
    return tree_unflatten([next(stacked_outputs) if isinstance(v, Tensor) else v for v in flat], result_spec)
