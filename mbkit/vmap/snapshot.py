"""Whether a module is as it was, so that what was made from it can be used again: much faster than to make it anew."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .module_copy import HOOKS, held_inside, is_leaf, named_modules, own_attributes

__all__ = ["Snapshot", "has_grad_hooks", "place"]


class Snapshot:
    """Tells whether a module is as it was: the very same objects in it, and in its lists and dicts.

    Args:
        root: the module, as it is now.
        settings: look at all that a replica takes over, and at where tensors are and who watches their gradients;
            otherwise only at what a call can change.
    """

    def __init__(self, root: nn.Module, settings: bool = True) -> None:
        self._dicts: list[dict] = []
        self._trees: list[tuple[dict, str]] = []
        for _, module in named_modules(root):
            mine, own = vars(module), own_attributes(module)
            self._dicts += [mine["_parameters"], mine["_buffers"]]
            self._dicts += [mine] if settings or own else []
            self._dicts += [mine[name] for name in ("_modules", *HOOKS)] if settings else []
            self._trees += [(mine, name) for name in own if not is_leaf(mine[name])]
        self._objects, self._forms = self._see()
        self._tensors = [leaf for leaf in self._objects if settings and isinstance(leaf, Tensor)]
        self._places = list(map(place, self._tensors))

    def _see(self) -> tuple[list[Any], list[Any]]:
        """Return the objects, and the structures that hold those of the user's own attributes."""
        trees = [tree_flatten(mine.get(name)) for mine, name in self._trees]
        found = [leaf for leaves, _ in trees for leaf in (*leaves, *held_inside(leaves))]
        for held in self._dicts:
            found += held.values()
        return found, [form for _, form in trees]

    @property
    def unchanged(self) -> bool:
        """Whether it still is."""
        now, forms = self._see()
        same = len(now) == len(self._objects) and all(map(operator.is_, now, self._objects))
        return same and forms == self._forms and list(map(place, self._tensors)) == self._places


def has_grad_hooks(tensor: Tensor) -> bool:
    """Say whether a stacked tensor has hooks on its gradient, which only the whole batch's backward pass runs."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def place(tensor: Tensor) -> tuple:
    """Return where a tensor is, in which form, whether it is trained, and whether somebody watches its gradient."""
    strided = (tensor.data_ptr(), tensor.stride()) if tensor.layout is torch.strided else ()
    return strided, tensor.shape, tensor.dtype, tensor.requires_grad, has_grad_hooks(tensor)
