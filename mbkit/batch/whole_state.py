"""All that a batch's further training depends on: put back after a refusal, saved with a run, loaded with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..vmap import PerModelValue, State
from .context import context_of


def snapshot(batch: Any) -> Callable[[], None]:
    """Return a function that puts a batch back to where it is now: tensors, attributes, streams, frozen models."""
    context = context_of(batch)
    stores = [
        (store, dict(store))
        for _, module in context.template.named_modules()
        for store in (vars(module)["_parameters"], vars(module)["_buffers"], vars(module))
    ]
    copies = [(t, t.detach().clone()) for t in State(context.template).tensors]
    frozen, attributes = context.frozen, context.attributes
    seeds, streams = list(context.streams.seeds), context.streams.state()

    def restore() -> None:
        for store, held in stores:
            store.update(held)
        for tensor, numbers in copies:
            tensor.data.copy_(numbers)
        context.frozen, context.attributes = frozen, attributes
        context.streams.seeds = seeds
        context.streams.load_state(streams)

    return restore


def save_whole(batch: Any) -> dict[str, Any]:
    """Return all that a batch's further training depends on, for `write_tree`.

    That is its `state_dict()`, its seeds, and what torch leaves out: buffers that are not persistent, and the numbers,
    texts and tensors in plain attributes. Objects of other kinds in plain attributes are left to who builds the models.
    """
    context = context_of(batch)
    stacked, kept = set(map(id, context.attributes)), {id(t) for t in batch.state_dict(keep_vars=True).values()}
    others = []
    for (path, store, name), value in State(context.template).items():
        own = value.values if isinstance(value, PerModelValue) else value
        leaves = tree_leaves(own)
        if store == "_parameters" or id(value) in kept or not all(map(_is_plain, leaves)):
            continue
        flags = [id(leaf) in stacked for leaf in leaves]
        others.append([path, store, name, own, isinstance(value, PerModelValue), flags])
    streams = context.streams
    return {"state": dict(batch.state_dict()), "seeds": list(streams.seeds), "drew": streams.in_use, "others": others}


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) or leaf is None or type(leaf) in (bool, int, float, str)


def load_whole(batch: Any, saved: Mapping[str, Any]) -> None:
    """Load what `save_whole` returned; the caller takes a `snapshot` before.

    Raises:
        ValueError: it belongs to other models, or to another number of them.
    """
    context = context_of(batch)
    if len(saved["seeds"]) != context.num_models:
        count = len(saved["seeds"])
        raise ValueError(f"Expected a run of {context.num_models} models, got one of {count}: build as many models.")
    for name, tensor in context.template.state_dict().items():
        expected, got = (None if t is None else (list(t.shape), t.dtype) for t in (tensor, saved["state"].get(name)))
        if expected != got:
            told = f"Expected '{name}' as {_words(expected)}, got {_words(got)}"
            raise ValueError(f"{told}: build models of the saved architecture.")
    batch.load_state_dict(saved["state"])
    if not saved["drew"]:
        context.streams.seeds = list(saved["seeds"])
        context.streams.load_state({})
    modules, device = dict(context.template.named_modules()), next(batch.parameters()).device
    for path, store, name, value, per_model, flags in saved["others"]:
        if path not in modules:
            raise ValueError(f"Expected a module '{path}' as in the saved run, got none: build the same models.")
        held = vars(modules[path]) if store == "__dict__" else vars(modules[path])[store]
        old = held.get(name)
        if isinstance(value, Tensor) and isinstance(old, Tensor) and old.shape == value.shape:
            old.data.copy_(value)
            continue
        value = tree_map_only(Tensor, lambda tensor: tensor.to(device), value)
        new = [leaf for leaf, flag in zip(tree_leaves(value), flags, strict=True) if flag]
        held[name] = PerModelValue(value) if per_model else value
        context.attributes = [*context.attributes, *new]


def _words(form: tuple[list[int], Any] | None) -> str:
    return "nothing" if form is None else f"{str(form[1]).removeprefix('torch.')} {form[0]}"
