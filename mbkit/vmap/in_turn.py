"""One model after the other, with its own random numbers: exact whatever is called, and no faster than alone.

So run the operators that draw random numbers or that torch.vmap has no rule for, the layers that it cannot run, and
whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from .errors import BatchingError, call_named
from .layout import SHARES, LayoutMatters, check_format, has_gaps, refuse_layout, storage_of
from .module_copy import ModuleCopy, materialize, merge
from .per_model import PerModel
from .registry import Pass
from .shared_objects import SharedObjects, is_object
from .snapshot import version
from .state import OUTPUT, State, keep_hooks, new_hooks, write_changes
from .unwrap import call_unwrapped, stack_alike

_NOT_EDITS = ("__init__", "__int__", "__index__", "__iter__", "__invert__")


class Failure:
    """Stands for the output of models whose forward has raised an error of its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def edits_in_place(operator: Callable) -> bool:
    """Say whether an operator changes its first argument, which torch marks by a trailing underscore."""
    name = getattr(operator, "__name__", "")
    if name.startswith("__"):
        return (name.startswith("__i") and name not in _NOT_EDITS) or name == "__setitem__"
    return name.endswith("_")


def model_by_model(mode: Pass, operator: Callable, args: tuple, kwargs: dict) -> Any:
    """The rule of last resort: the same kernel runs on each model's numbers, in the layout that they have alone."""
    if kwargs.get("out") is not None:
        raise BatchingError("out= is not supported here: assign the result instead")
    edits = edits_in_place(operator)

    def call(m: int, module: None, args: tuple, kwargs: dict) -> Any:
        result = operator(*args, **kwargs)
        return None if edits else result

    result = _inside_vmap(mode, State(), args, kwargs, call, edits)[0]
    return args[0] if edits else result


def loop_inside(mode: Pass, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module under vmap as a loop over the models' own copies of it.

    Raises:
        BatchingError: it gets an object that may keep something, such as a cache, which all models would fill.
    """
    for leaf in tree_leaves((args, kwargs)):
        if is_object(leaf) and not isinstance(leaf, (Enum, partial)):
            raise BatchingError(f"it gets a {type(leaf).__name__}, one object in which all models would keep theirs")
    before = State(module)
    output, changes, _ = _inside_vmap(mode, before, args, kwargs)
    write_changes(before, changes)
    return output


def _inside_vmap(mode: Pass, before: State, args: tuple, kwargs: dict, *what: Any) -> tuple[Any, dict, list[Tensor]]:
    mode.check_hooks()

    def on(run: Callable, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        def below(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor, ...]:
            if mode.folded and any(own and has_gaps(t[0]) for t, own in zip(stacks, stacked, strict=True)):
                raise LayoutMatters
            for t in (t[0] for t, own in [*zip(stacks, stacked, strict=True)][len(before.tensors) :] if own):
                check_format(mode, t)
            versions = list(map(version, stacks))
            with torch._C.DisableTorchFunction():  # torch's encoder layers take another path where they see a mode
                result = run(stacks, stacked)
            if any(version(t) != was and storage_of(t) in mode.copies for t, was in zip(stacks, versions, strict=True)):
                refuse_layout(mode, SHARES)
            return result

        return call_unwrapped(mode, below, tensors)

    with mode.streams.take_turns(mode.device) as turns:
        return call_in_turn(before, args, kwargs, turns, on, *what)


def call_in_turn(
    before: State,
    args: tuple,
    kwargs: dict,
    turns: Iterator[int],
    on: Callable,
    call: Callable | None = None,
    edits: bool = True,
    whole: bool = False,
    method: str = "",
) -> tuple[Any, dict, list[Tensor]]:
    """Call a module, or an operator, for each model, and put together what the calls returned and changed.

    Args:
        before: the state of the module, which holds the stacked tensors; an empty one for an operator.
        args, kwargs: of the call.
        turns: yields 0 … M-1, each while model m's random stream is in place.
        on: gets a function and tensors; calls it with the tensors `[M, ...]` or shared, and a flag that says which.
        call: what to do in a model's turn instead of calling its copy of the module; gets the model's number, the copy,
            its arguments and keyword arguments.
        edits: whether the call may edit its inputs in place.
        whole: whether the module is the whole model.
        method: what of the module is called, by its dotted name; "" for the module itself.

    Returns:
        The output, what the calls have changed, and the new tensors `[M, ...]` in plain attributes. If calls of the
        whole model have raised, the first error as a `Failure`: each model has got as far as it gets alone.
    """
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    generators = [(leaf, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]
    kept, next_hook = before.tensors, RemovableHandle.next_id
    merged: list[dict] = []
    failures: list[Exception] = []

    def arguments(m: int, tensors: list[Tensor]) -> tuple[tuple, dict]:
        mine = [leaf.values[m] if isinstance(leaf, PerModel) else leaf for leaf in leaves]
        for place, tensor in zip(places, tensors, strict=True):
            mine[place] = tensor
        for generator, start in generators:  # each model makes one for itself, so all draw the same from it
            generator.set_state(start)
        return tree_unflatten(mine, spec)

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor, ...]:
        tracked = [torch.is_grad_enabled() and t.requires_grad and i >= len(kept) for i, t in enumerate(stacks)]
        is_copy = [edits and (not s or t) for s, t in zip(stacked, tracked, strict=True)]
        rows = [_rows(*facts) for facts in zip(stacks, stacked, is_copy, strict=True)]
        columns: list[list[Tensor]] = [[] for _ in stacks]
        copies, states, edited, moved = [], [], set(), set()
        for m in turns:
            own = [row(m) for row in rows]
            marks = [(version(t), _place(t)) for t in own]
            copies.append(ModuleCopy(before, dict(zip(map(id, kept), own, strict=False)), m))  # lest ids be used again
            my_args, my_kwargs = arguments(m, own[len(kept) :])
            output = None
            try:
                mine = copies[-1].module, method, my_args, my_kwargs
                output = call(m, mine[0], my_args, my_kwargs) if call else call_named(*mine)
            except Exception as error:
                if not whole or call:
                    raise
                failures.append(error)
            for i, (tensor, mark) in enumerate(zip(own, marks, strict=True)):
                if is_copy[i] and version(tensor) != mark[0]:
                    edited.add(id(tensor))
                elif not is_copy[i] and _place(tensor) != mark[1]:  # w.data = …, or another size
                    moved.add(i)
                    tensor = tensor.data.clone()  # what has grown in place reaches into the next model's
                columns[i].append(tensor)
            states.append(copies[-1].changes(output, edited))
        if not failures:
            SharedObjects.keep([copied.assigned for copied in copies])
            if RemovableHandle.next_id != next_hook and before.modules:
                keep_hooks(before, [new_hooks(before, copied.module) for copied in copies])
        for state in states if failures else ():
            state[OUTPUT] = None
        for i in moved:
            if len({tensor.shape for tensor in columns[i]}) > 1:
                raise BatchingError("a call gives a buffer another size, and not the same to each model's")
            new = stack_alike([tensor.data for tensor in columns[i]])
            if new.shape == stacks[i].shape:
                stacks[i].data.copy_(new)
            else:
                stacks[i].data = new
        for i in range(len(kept), len(stacks)):
            if edited.isdisjoint(map(id, columns[i])):
                continue
            if stacked[i]:
                stacks[i].copy_(stack_alike(columns[i]))
            elif not whole:
                raise BatchingError("an input that all models share is edited in place, with other values for each")
        changes, fresh = merge(states, before, whole)
        merged.append(changes)
        return tuple(map(stack_alike, fresh))

    new = on(run, [*kept, *(leaves[i] for i in places)])
    output, changes, attributes = materialize(merged[0], new)
    return (Failure(failures[0]) if failures else output), changes, attributes


def _rows(stack: Tensor, stacked: bool, copied: bool) -> Callable[[int], Tensor]:
    """Return a function from m to model m's own tensor.

    What does not require gradients is a view, so that edits in place land in the stack. What does is one of the
    views of `unbind`, because M gradients of single slices would each be as large as the stack; torch lets nobody
    edit such a view, so inputs, which may be edited, are copied, and the edits copied back. The slice of one model is
    no larger than the stack, and a forward may edit its weights.
    """
    if stacked:
        row = (stack.unbind() if stack.requires_grad and len(stack) > 1 else stack).__getitem__
    else:
        row = partial(lambda stack, m: stack, stack)
    return (lambda m: row(m).clone()) if copied else row


def _place(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.data_ptr() if tensor.layout is torch.strided else 0
