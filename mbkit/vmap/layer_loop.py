"""Running one submodule, or a whole model, for one model after the other: exact whatever it does, and no faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .errors import BatchingError
from .module_copy import OUTPUT, copy_module, flattened, materialize, merge, outcome, read_state, write_state
from .registry import Pass
from .rules.convolution import check_order
from .unwrap import on_stacks, stack_alike

__all__ = ["Failure", "call_in_turn", "loop_inside", "tensors_in"]


class Failure:
    """Stands for the output of models whose forward has raised an error of its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested value, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def loop_inside(mode: Pass, module: nn.Module) -> Callable:
    """Return what stands for the module's call under vmap: a loop over the models' own copies of it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        mode.check_hooks()
        before = read_state(module)

        def on(run: Callable, tensors: list[Tensor]) -> tuple[Tensor, ...]:
            def below(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor, ...]:
                check_order(mode, stacks, stacked)
                with mode.off():
                    return run(stacks, stacked) or (mode.index_values,)

            return on_stacks(below, mode.index, tensors)

        with mode.streams.take_turns(mode.device) as turns:
            output, after, _ = call_in_turn(module, before, args, kwargs, turns, on, whole=False)
        write_state(module, before, after)
        return output

    return call


def call_in_turn(
    module: nn.Module, before: dict, args: tuple, kwargs: dict, turns: Iterator[int], on: Callable, *, whole: bool
) -> tuple[Any, dict, list[Tensor]]:
    """Call a copy of the module for each model, and put together what they returned and changed.

    Args:
        module: holds the stacked tensors.
        before: its state.
        args, kwargs: of the call.
        turns: yields 0 … M-1, each while model m's random stream is in place.
        on: gets a function and tensors; calls it with the tensors `[M, ...]` or shared, and a flag that says which.
        whole: whether the module is the whole model.

    Returns:
        The output, the state after the calls, and the new tensors `[M, ...]` in plain attributes. If calls of the whole
        model have raised, the first error as a `Failure`: each model has got as far as it gets alone.
    """
    leaves, spec = tree_flatten((args, kwargs))
    inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    kept = tensors_in(before)
    merged: list[dict] = []
    failures: list[Exception] = []

    def run(stacks: list[Tensor], stacked: list[bool]) -> tuple[Tensor, ...]:
        grad = torch.is_grad_enabled()
        copied = [
            not s or (grad and t.requires_grad and i >= len(kept))
            for i, (t, s) in enumerate(zip(stacks, stacked, strict=True))
        ]
        rows = [_rows(t, s, c) for t, s, c in zip(stacks, stacked, copied, strict=True)]
        records, known, alive, anything = [], [], [], set()
        resized: dict[int, list[Tensor]] = {}
        edited_inputs: dict[int, list[Tensor]] = {i: [] for i in range(len(kept), len(stacks)) if copied[i]}
        for m in turns:
            own = [row(m) for row in rows]
            marks = [(_version(t), _address(t)) for t in own]
            mine = list(leaves)
            for place, tensor in zip(inputs, own[len(kept) :], strict=True):
                mine[place] = tensor
            twin = copy_module(module, {id(t): o for t, o in zip(kept, own, strict=False)}, m)
            alive.append(twin)  # for as long as other copies are made, so that none gets its id
            given = flattened(twin)
            my_args, my_kwargs = tree_unflatten(mine, spec)
            try:
                output = twin(*my_args, **my_kwargs)
            except Exception as error:
                if not whole:
                    raise
                output = None
                failures.append(error)
            edited = set()
            for i, (tensor, (version, pointer)) in enumerate(zip(own, marks, strict=True)):
                if not copied[i] and tensor.shape != stacks[i].shape[1:]:
                    resized.setdefault(i, []).append(tensor.data.clone())
                elif not copied[i] and _address(tensor) != pointer:  # w.data = …
                    stacks[i].data[m].copy_(tensor.data)
                elif copied[i] and _version(tensor) != version:
                    edited.add(id(tensor))
                if i in edited_inputs:
                    edited_inputs[i].append(tensor)
            records.append(outcome(twin, given, before, edited, output, m))
            origins = {id(t): t for t in kept}
            known.append(origins | {id(o): t for t, o in zip(kept, own, strict=False) if id(o) not in edited})
            anything |= edited
        if failures:
            for record in records:
                record[OUTPUT] = None
        for i, tensors in resized.items():
            if len({tensor.shape for tensor in tensors}) > 1 or len(tensors) < len(records):
                raise BatchingError("a call gives a buffer another size, and not the same to each model's")
            stacks[i].data = stack_alike(tensors)
        for i, tensors in edited_inputs.items():
            if anything.isdisjoint(map(id, tensors)):
                continue
            if stacked[i]:
                stacks[i].copy_(stack_alike(tensors))
            elif not whole:
                raise BatchingError("an input that all models share is edited in place, with other values for each")
        state, fresh = merge(records, before, known, whole)
        merged.append(state)
        return tuple(stack_alike(column) for column in fresh)

    new = on(run, [*kept, *(leaves[i] for i in inputs)])
    output, after, attributes = materialize(merged[0], new)
    return (Failure(failures[0]) if failures else output), after, attributes


def _rows(stack: Tensor, stacked: bool, copied: bool) -> Callable[[int], Tensor]:
    """Return a function from m to model m's own tensor.

    What does not require gradients is a view, so that edits in place land in the stack. What does is one of the
    views of `unbind`, because M gradients of single slices would each be as large as the stack; torch lets nobody
    edit such a view, so inputs, which may be edited, are copied, and the edits copied back. The slice of one model is
    no larger than the stack, and a forward may edit its weights.
    """
    if not stacked:
        return lambda m: stack.clone()  # one model's edits in place are not the others' business
    rows = stack.unbind() if stack.requires_grad and len(stack) > 1 else stack
    return lambda m: rows[m].clone() if copied else rows[m]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else 0
