"""Models' rows: single models taken out of what several batches saved, and joined into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["join", "join_schedules", "pack", "take", "unpack"]

_STREAMS = "mbkit_streams."


def take(whole: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return some models' share of what `save_whole` returned for a batch, in the order of `rows`."""
    others = []
    for path, store, name, value, per_model, flags in whole["others"]:
        if per_model:
            value = [value[m] for m in rows]
        else:
            leaves, form = tree_flatten(value)
            own = zip(leaves, _stacked(store, flags), strict=True)
            leaves = [leaf[list(rows)] if stacked else leaf for leaf, stacked in own]
            value = tree_unflatten(leaves, form)
        others.append([path, store, name, value, per_model, flags])
    state = {name: tensor[list(rows)] for name, tensor in whole["state"].items()}
    return {**whole, "state": state, "seeds": [whole["seeds"][m] for m in rows], "others": others}


def join(wholes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the models of several batches as `save_whole` would for one batch of them all, in that order.

    Raises:
        ValueError: they keep different things beside their tensors.
    """
    if len(wholes) == 1:
        return dict(wholes[0])
    first = wholes[0]
    names = dict.fromkeys(name for whole in wholes for name in whole["state"])
    state = {name: torch.cat([_rows(whole, name) for whole in wholes]) for name in names}
    others = []
    for each in zip(*(whole["others"] for whole in wholes), strict=True):
        path, store, name, value, per_model, flags = each[0]
        if any((*own[:3], own[4:]) != (*each[0][:3], each[0][4:]) for own in each):
            raise ValueError(f"Expected models that keep the same attributes, got others in '{path}' beside {name!r}.")
        if per_model:
            value = [one for own in each for one in own[3]]
        else:
            columns = zip(*(tree_flatten(own[3])[0] for own in each), strict=True)
            own = zip(columns, _stacked(store, flags), strict=True)
            leaves = [torch.cat(column) if stacked else column[0] for column, stacked in own]
            value = tree_unflatten(leaves, tree_flatten(value)[1])
        others.append([path, store, name, value, per_model, flags])
    seeds = [seed for whole in wholes for seed in whole["seeds"]]
    return {**first, "state": state, "seeds": seeds, "drew": any(w["drew"] for w in wholes), "others": others}


def _stacked(store: str, flags: Sequence[bool]) -> list[bool]:
    """Say which tensors of an attribute are `[M, ...]`: those that are flagged, and all buffers."""
    return [flag or store == "_buffers" for flag in flags]


def _rows(whole: Mapping[str, Any], name: str) -> Tensor:
    """Return a batch's rows of a tensor; of one that only batches have whose models drew, or froze, the first."""
    if name in whole["state"]:
        return whole["state"][name]
    seeds, kind = whole["seeds"], name.removeprefix(_STREAMS)
    if kind == "seeds":
        return torch.tensor(seeds)
    if kind == "frozen":
        return torch.zeros(len(seeds), dtype=torch.bool)
    if kind == name or kind != "cpu":
        raise ValueError(f"Expected models that keep the same tensors, got '{name}' in some of them only.")
    return torch.stack([torch.Generator().manual_seed(seed).get_state() for seed in seeds])


def pack(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return flat dicts of M models as columns, so that a file holds a tensor for each name and not for each model."""
    packed: dict[str, Any] = {"count": len(states)}
    for name in dict.fromkeys(name for state in states for name in state):
        have = [m for m, state in enumerate(states) if name in state]
        values = [states[m][name] for m in have]
        alike = isinstance(values[0], Tensor) and all(
            isinstance(value, Tensor) and (value.shape, value.dtype) == (values[0].shape, values[0].dtype)
            for value in values
        )
        packed[f"/{name}"] = [None if len(have) == len(states) else have, torch.stack(values) if alike else values]
    return packed


def unpack(packed: Mapping[str, Any], rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Return the flat dicts again, those of some models or of all."""
    states: list[dict[str, Any]] = [{} for _ in range(packed["count"])]
    for name, held in packed.items():
        if name != "count":
            have, values = held
            for m, value in zip(range(len(states)) if have is None else have, values, strict=True):
                states[m][name[1:]] = value
    return states if rows is None else [states[m] for m in rows]


def join_schedules(parts: Sequence[tuple[Any, Sequence[int], int]]) -> Any:
    """Return the state of one schedule for some models of several.

    A list with an entry for each parameter group, such as `base_lrs`, or for each model is taken apart.

    Args:
        parts: a schedule's state_dict(), the models wanted of it, and how many it has.
    """
    first = parts[0][0]
    if not isinstance(first, dict):
        return first
    joined = {}
    for name, value in first.items():
        if isinstance(value, list) and (name == "schedulers" or name.endswith(("lrs", "_lr", "lr_lambdas"))):
            joined[name] = [
                one for state, rows, count in parts for m in rows for one in _share(state[name], m, count)
            ]
        elif name == "_schedulers":  # of SequentialLR and ChainedScheduler
            inner = range(len(value))
            joined[name] = [join_schedules([(own[name][i], rows, n) for own, rows, n in parts]) for i in inner]
        else:
            joined[name] = value
    return joined


def _share(values: list[Any], m: int, count: int) -> list[Any]:
    size = len(values) // count
    return values[m * size : (m + 1) * size]
