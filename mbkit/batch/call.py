"""One call of M models: all at once under vmap, and whatever cannot be run so one model after the other."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.vmap import lazy_load_decompositions

from ..common.checks import check_inputs, check_numbers, check_output, take_apart
from ..common.functions import depth_of_user
from ..common.objects import tensors_of
from ..vmap import (
    BatchingError,
    ClosedOutput,
    Failure,
    LayoutMatters,
    ModuleCopy,
    OnStack,
    Pass,
    RuleMode,
    SharedDraw,
    SharedInput,
    State,
    WholeInTurn,
    call_in_turn,
    call_named,
    given_to_models,
    graph_nodes,
    is_channels_last,
    is_folded,
    loop_inside,
    materialize,
    merge,
    module_path,
    own_rows,
    running_modules,
    tensors_in,
    watch_backward,
    write_changes,
)
from .context import CallContext
from .freeze import held
from .hooks import hooked
from .kept import kept_by
from .memory import Memory

_load_decompositions = cache(lazy_load_decompositions)

# Errors that can be raised again under the same name with a longer text.
PLAIN_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
NO_FAULT_OF_VMAP = (torch.OutOfMemoryError, Warning)


def call_models(
    context: CallContext, args: tuple, kwargs: dict, shared: bool, in_turn: Callable | None = None, method: str = ""
) -> Any:
    """Call the template once for all models, and keep what it assigned anew in the context.

    A layer that vmap cannot run is noted in `context.model_by_model`, and the call starts again, with that layer run
    for one model after the other. If that fails too, the layer around it is taken, up to the model itself, which then
    does what plain PyTorch does: an error of the user's own shows as it does there.

    Args:
        context: the models.
        args, kwargs: what one model takes; tensors in them are `[B, ...]`, or `[M, B, ...]` unless `shared`.
        shared: whether all models see the same input.
        in_turn: what to do in plain PyTorch with each model's own copy of the template, one after the other, instead of
            calling all models at once; arguments as for `call_in_turn`. After an error nothing has changed.
        method: the dotted name of the method or submodule to call; "" for the models themselves.

    Returns:
        The model's own nested output, or what `in_turn` returns, each tensor `[M, ...]`. Numbers that differ between
        the models are a `PerModel`, other values (and what cannot be taken apart, such as a file) a `PerModelValue`.
    """
    leaves, rebuild = take_apart(args, kwargs)
    check_numbers(leaves, context.template)
    with held(context):
        return _call(context, leaves, rebuild, shared, in_turn, method)


def _call(
    context: CallContext, leaves: list[Any], rebuild: Callable, shared: bool, in_turn: Callable | None, method: str
) -> Any:
    template, slow = context.template, context.model_by_model
    reasons: dict[str, str] = {}  # of the paths that are added in this call
    before = State(template)
    for path in set() if in_turn else hooked(before.modules) - slow:
        slow.add(path)
        reasons[path] = "its hooks are to see each model's own tensors and gradients"
    while True:
        memory = Memory(context, before, method)
        try:
            output, changes, context.attributes = attempt(context, before, leaves, rebuild, shared, in_turn, method)
            write_changes(before, changes)
            break
        except Exception as error:
            undone = memory.undo(error)
            if isinstance(error, LayoutMatters):
                context.folding = False
            elif isinstance(error, SharedInput) and not context.own_rows:
                context.own_rows = True
            else:
                is_vmaps = undone and in_turn is None and not isinstance(error, NO_FAULT_OF_VMAP)
                unit = _next_slower(error, slow, method) if is_vmaps else None
                unit = (f"{method}()" if method else "") if isinstance(error, WholeInTurn) else unit
                if unit is None:
                    slow.difference_update(reasons)
                    raise _named(error, context.num_models) from error
                slow.add(unit)
                if not isinstance(error, SharedDraw):
                    reasons[unit] = str(error).strip().split("\n")[0]
    memory.learn()
    if isinstance(output, Failure):  # the user's own error, so what the calls have changed before it stays, as alone
        slow.difference_update(reasons)
        raise _named(output.error, context.num_models) from output.error
    made = [] if isinstance(output, nn.Module) else tensors_of(output)
    context.returned = list(map(weakref.ref, made))
    watch_backward([*made, *context.attributes], (*before.values(), *leaves), context.num_models, bool(slow))
    for path, reason in reasons.items():
        kind = f" ({type(before.modules[path]).__name__})" if path in before.modules else ""
        where = f"'{path}'{kind}" if path else "The whole model"
        told = f"{where} runs model by model: exact, but no faster than alone, since torch.vmap cannot run it"
        told += f" ({reason}). ModelBatch(..., model_by_model=[{path!r}]) says so beforehand, without this warning."
        warnings.warn(told, stacklevel=depth_of_user())
    return output


def _next_slower(error: Exception, slow: set[str], method: str) -> str | None:
    """Return the path of the layer to run model by model after an error; None if there is no wider one to try."""
    paths = [vars(module)["mbkit_path"] for module in running_modules(error.__traceback__)]
    if not paths and isinstance(error, ClosedOutput):
        paths = [""]
    paths = [path or f"{method}()" for path in paths] if method else paths
    first = next((i for i, path in enumerate(paths) if path in slow), len(paths))
    return paths[first - 1] if first else None


def _named(error: Exception, num_models: int) -> Exception:
    """Return the error with the layer in its text, in which it came up."""
    running = running_modules(error.__traceback__)
    where = module_path(running[-1]) if running else "the model itself"
    if type(error) is BatchingError:
        return BatchingError(f"{where} cannot run for {num_models} models: {error}")
    return type(error)(f"{where}: {error}") if type(error) in PLAIN_ERRORS and running else error


def attempt(
    context: CallContext,
    before: State,
    leaves: list[Any],
    rebuild: Callable,
    shared: bool,
    in_turn: Callable | None = None,
    method: str = "",
) -> tuple[Any, dict, list[Tensor]]:
    """Call the template once for all models, and change nothing of it but by edits in place.

    Args:
        context: the models.
        before: the template's state.
        leaves, rebuild: of the arguments, from `take_apart`.
        shared, in_turn, method: as for `call_models`.

    Returns:
        The output, what the call has changed, and the stacked tensors that then are among the plain attributes.
    """
    template, attributes = context.template, context.attributes
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not shared:
        check_inputs(leaves, context.num_models)
    kept = before.tensors
    stacked = {id(t) for key, t in before.items() if key[1] != "__dict__"} | set(map(id, attributes))
    device = next((t.device for t in (*kept, *(leaves[i] for i in places))), torch.device("cpu"))

    if in_turn or not context.model_by_model.isdisjoint(("", f"{method}()")):
        flags = [id(t) in stacked for t in kept] + [not shared] * len(places)
        kept_outside = kept_by(context, method=method).in_parts(context.num_models)
        with kept_outside as part, context.streams.take_turns(device, part) as turns:

            def on(run: Callable, tensors: list[Tensor]) -> tuple[Tensor, ...]:
                alone = in_turn is not None  # rows that are leaves, whose gradients are each model's own
                mine = [t.detach() if alone and t.requires_grad else t for t in tensors[: len(kept)]]
                return run([*mine, *tensors[len(kept) :]], flags)

            output, changes, new = call_in_turn(before, *rebuild(leaves), turns, on, in_turn, whole=True, method=method)
        if not in_turn and not isinstance(output, Failure) and not method:
            check_output(output, template)
    else:
        kept = [t for t in kept if id(t) in stacked]
        seen: list[dict] = []
        kept_outside = kept_by(context, method=method)

        def one_model(mode: Pass, *own: Tensor) -> tuple[Tensor, ...]:
            mine = list(leaves)
            for place, tensor in zip(places, own[len(kept) :], strict=True):
                mine[place] = tensor
            copied = ModuleCopy(before, dict(zip(map(id, kept), own, strict=False)))
            slow = [copied.module.get_submodule(path) for path in context.model_by_model if path in before.modules]
            for module in slow:
                vars(module)["_call_impl"] = OnStack(kept_outside.left_alone()(loop_inside), mode, module)
            with kept_outside.under_vmap():
                output = call_named(copied.module, method, *rebuild(mine))
            for module in slow:  # a circle, which would keep tensors alive
                del vars(module)["_call_impl"]
            if not method:
                check_output(output, template)
            merged, fresh = merge([copied.changes(output)], before)
            seen.append(merged)
            return tuple(column[0] for column in fresh)

        tensors = [*kept, *(leaves[i] for i in places)]
        in_dims = [0] * len(kept) + [None if shared else 0] * len(places)
        results = at_once(context, one_model, tensors, in_dims)
        _check_intermediates([t for t in results if t.grad_fn is not None])
        output, changes, new = materialize(seen[0], [t.contiguous() if is_folded(t) else t for t in results])
    if not attributes and not new:
        return output, changes, attributes
    standing = tensors_in({key: value for key, value in (before | changes).items() if key[1] == "__dict__"})
    standing = set(map(id, standing))
    return output, changes, [t for t in (*attributes, *new) if id(t) in standing]


def _check_intermediates(results: list[Tensor]) -> None:
    """Raise `LayoutMatters` if a folded result leads to another one, for its copy would not, and get no gradient."""
    folded = {t.grad_fn for t in results if is_folded(t)} if len(results) > 1 else ()
    if folded and any(after in folded for node in graph_nodes(results) for after, _ in node.next_functions):
        raise LayoutMatters


def at_once(
    context: CallContext, function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], in_dims: list[int | None]
) -> tuple[Tensor, ...]:
    """Run a function of the pass and one model's tensors for all models at once."""
    device = tensors[0].device if tensors else torch.device("cpu")
    _load_decompositions()
    # vmap's own remark that it loops over the models for some operator is on by default, and nothing to act upon.
    functorch._set_vmap_fallback_warning_enabled(False)
    # What torch.vmap does, without taking apart nested arguments, which costs small models a tenth of a step.
    # "error": a random operator that no rule covers raises here, where "different" would draw wrong numbers.
    level = functorch._vmap_increment_nesting(context.num_models, "error")
    try:
        known = context.per_model_settings, context.folding, context.own_rows, context.traced
        mode = Pass(context.num_models, context.streams, device, level, *known)
        own = [given_to_models(mode, t, d is None) for t, d in zip(tensors, in_dims, strict=True)]
        mode.channels_last = any(is_channels_last(t, d == 0) for t, d in zip(tensors, in_dims, strict=True))
        with context.streams.shared_draws_refused(), RuleMode(mode):
            outputs = function(mode, *own)
        rows = [own_rows(mode, t) for t in outputs]
        return tuple(functorch._remove_batch_dim(t, level, context.num_models, 0) for t in rows)
    finally:
        functorch._vmap_decrement_nesting()
        functorch._set_vmap_fallback_warning_enabled(True)
