"""How much memory a call takes: what it keeps for its backward pass, or all that it makes where there is to be none."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..vmap import graph_nodes


def saved_bytes(outputs: Any, given: Any) -> int:
    """Return the bytes that the graph below `outputs` keeps for its backward pass, without those of `given` tensors.

    The graph is looked at after the call: hooks on what autograd saves, which would see it during the call, are
    refused by `torch.func` inside a model's forward.

    Example:
        >>> import torch
        >>> x = torch.ones(100, requires_grad=True)
        >>> saved_bytes(x.exp() + 1, x)  # exp keeps its result
        400
    """
    known, kept = _storages(given), {}
    for node in graph_nodes(outputs):
        kept.update(_storages(_saved_values(node)))
    return sum(size for address, size in kept.items() if address not in known)


def _saved_values(node: Any) -> list[Any]:
    """Return what a node keeps; torch's own have it in attributes, those of an autograd.Function in a tuple."""
    names = ["saved_tensors"] if hasattr(node, "saved_tensors") else [n for n in dir(node) if n.startswith("_saved_")]
    found = []
    for name in names:
        with suppress(RuntimeError):  # where it was edited since; the backward pass will say so
            found.append(getattr(node, name))
    return found


class MadeBytes(TorchDispatchMode):
    """A `with` block in which the bytes of every storage that an operator makes are added up in `total`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made, given = function(*args, **(kwargs or {})), _storages((args, kwargs))
        self.total += sum(size for address, size in _storages(made).items() if address not in given)
        return made


def _storages(tree: Any) -> dict[int, int]:
    """Return the storages of the tensors in a tree: address to bytes."""
    found = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            with suppress(RuntimeError):  # a sparse tensor has none, nor have zeros that torch.func.jvp has made
                storage = leaf.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found
