"""A step of M lone optimizers at once: the user's own class, run by torch.vmap on the stacked tensors.

A float that differs between the models, such as the learning rate, is a `PerModel` there, whose arithmetic is each
model's own. What cannot be done so, a decision that the models take differently, say, raises; nothing has changed then,
and the models step in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..batch.call import at_once
from ..batch.context import CallContext
from ..vmap import BatchingError, Pass, PerModel
from .groups import parameters_of

Lone = torch.optim.Optimizer
Image = dict[tuple[str, int, str], Any]  # all that an optimizer holds, by its kind, the number of its owner, its name
_SIMPLE = (bool, int, float, str, type(None))
_OPENED = ("state", "defaults", "param_groups")


def form_of(image: Image) -> tuple[Any, ...]:
    """Return what optimizers must have in common to step at once: all but the numbers in tensors and floats."""
    return tuple([(path, _form(value)) for path, value in image.items()])


def _form(value: Any) -> Any:
    kind = type(value)
    if kind is float:
        return value == 0  # a weight decay of 0 is skipped
    if kind in _SIMPLE:
        return kind, value
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    return tuple(map(_form, value)) if kind is tuple else object()  # equal to nothing: it may be changed in place


def step_at_once(
    context: CallContext,
    lones: Sequence[Lone],
    images: Sequence[Image],
    params: Sequence[nn.Parameter],
    models: Sequence[int],
) -> bool:
    """Make a step of lone optimizers of one form, if that can be done; else return False, and nothing has changed.

    Args:
        context: of the batch.
        lones: the optimizers of these models.
        images: what each holds, by `image_of`.
        params: the stacked parameters, in the optimizers' order, whose gradients all these models have, or none.
        models: the models' numbers.
    """
    chosen = slice(None) if len(models) == context.num_models else list(models)
    weights = [p.detach()[chosen].clone().requires_grad_(p.requires_grad) for p in params]
    grads = {i: p.grad[chosen].clone() for i, p in enumerate(params) if p.grad is not None}
    marks = {i: grad._version for i, grad in grads.items()}
    try:
        left, results = _run(context, lones[0], images, weights, grads)
    except Exception:  # vmap's, a PerModel's, or the class's own, which then comes up again in turn
        return False
    places = [t.untyped_storage().data_ptr() for t in (*weights, *grads.values(), *results.values()) if t.numel()]
    if len(set(places)) < len(places):
        return False  # alone, an edit of one would be an edit of the other from here on
    rows = {path: result.unbind(0) for path, result in results.items()}
    for k, lone in enumerate(lones):
        _write(lone, {path: each[k] for path, each in rows.items()})
        _write(lone, {path: _own(value, k) for path, value in left.items()})
    for i, param in enumerate(params):
        param.detach()[chosen] = weights[i].detach()
        if i in grads and grads[i]._version != marks[i]:
            param.grad[chosen] = grads[i]
    return True


def _run(
    context: CallContext, first: Lone, images: Sequence[Image], weights: list[Tensor], grads: dict[int, Tensor]
) -> tuple[Image, Image]:
    """Return what the step has changed: values, and tensors `[M, ...]`."""
    tensors, slots, after = [*weights, *grads.values()], {}, {}
    for path, value in images[0].items():
        if isinstance(value, Tensor):
            slots[path] = len(tensors)
            tensors.append(torch.stack([image[path] for image in images]))
    given = {path: _merged([image[path] for image in images]) for path in images[0] if path not in slots}

    def step(mode: Pass, *own: Tensor) -> tuple[Tensor, ...]:
        mode.reads_gradients = True
        params, gradients = own[: len(weights)], own[len(weights) :]
        for i, gradient in zip(grads, gradients, strict=False):
            params[i].grad = gradient
        one, left = object.__new__(type(first)), iter(params)
        vars(one).update(vars(first), state=defaultdict(dict), defaults={}, param_groups=[])
        for group in first.param_groups:
            loop = {"foreach": False} if "foreach" in group else {}
            one.param_groups.append({"params": [next(left) for _ in group["params"]], **loop})
        _write(one, given | {path: own[slot] for path, slot in slots.items()})
        one.step()
        after.update(image_of(one))
        return tuple(value for value in after.values() if isinstance(value, Tensor))

    models = {"num_models": len(images), "streams": _NoDraws(context.streams), "per_model_settings": True}
    results = at_once(replace(context, folding=False, **models), step, tensors, [0] * len(tensors))
    paths = [path for path, value in after.items() if isinstance(value, Tensor)]
    left = {path: value for path, value in after.items() if path not in paths and value is not given.get(path, after)}
    for value in left.values():
        _own(value, 0)
    if not images[0].keys() <= after.keys():
        raise BatchingError("it has removed something")
    return left, {path: t if t.stride(0) else t.clone() for path, t in zip(paths, results, strict=True)}


class _NoDraws:
    """Stands for the models' streams: a step that draws random numbers draws in turn."""

    def __init__(self, streams: Any) -> None:
        self.shared_draws_refused = streams.shared_draws_refused

    def __getattr__(self, name: str) -> NoReturn:
        raise BatchingError("it draws random numbers, or calls an operator that runs model by model")


def image_of(lone: Lone) -> Image:
    """Return what an optimizer holds, but for parameters, defaults, empty lists of hooks, torch's choice of a loop."""
    rest = {n: v for n, v in vars(lone).items() if n not in _OPENED and (v or not n.endswith("_hooks"))}
    image: Image = {("self", 0, name): value for name, value in rest.items()}
    for g, group in enumerate(lone.param_groups):
        for name, value in group.items():
            if name not in ("params", "foreach"):
                image["group", g, name] = value
    states = list(map(lone.state.get, parameters_of(lone.param_groups)))
    for i, state in enumerate(states):
        for name, value in (state or {}).items():
            image["state", i, name] = value
    if len(lone.state) > len(states) - states.count(None):
        image["self", 0, "state"] = lone.state  # something else than a state for each parameter
    return image


def _write(lone: Lone, image: Image) -> None:
    """Give an optimizer what an image says."""
    params = parameters_of(lone.param_groups)
    for (kind, i, name), value in image.items():
        if kind == "state":
            lone.state[params[i]][name] = value
        elif kind == "group":
            lone.param_groups[i][name] = value
        else:
            setattr(lone, name, value)


def _merged(values: list[Any]) -> Any:
    first = values[0]
    if all(type(value) is float for value in values) and any(value != first for value in values):
        return PerModel(values)
    if isinstance(first, tuple):
        return tuple(_merged(list(column)) for column in zip(*values, strict=True))
    return first


def _own(value: Any, k: int) -> Any:
    """Return one model's of a value that a step has left; anything that models might share is refused."""
    if isinstance(value, tuple):
        return tuple(_own(part, k) for part in value)
    if type(value) is PerModel:
        return value.values[k]
    if type(value) not in _SIMPLE:
        raise BatchingError(f"it keeps a {type(value).__name__}")
    return value
