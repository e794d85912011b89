"""Whether a module is as it was, so that what was made from it can be used again: much faster than to make it anew."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn
from torch.utils._pytree import tree_flatten

from .replica import HOOKS, held_inside, is_leaf, named_modules, own_attributes

__all__ = ["Look"]


class Look:
    """Tells whether a module is as it was: the very same objects in it, and in its lists and dicts.

    Args:
        root: the module, as it is now.
        settings: look at all that a replica takes over; otherwise only at what a call can change.
    """

    def __init__(self, root: nn.Module, settings: bool = True) -> None:
        self._places: list[dict] = []
        self._trees: list[tuple[dict, str]] = []
        for _, module in named_modules(root):
            mine, own = vars(module), own_attributes(module)
            self._places += [mine["_parameters"], mine["_buffers"]]
            self._places += [mine] if settings or own else []
            self._places += [mine[name] for name in ("_modules", *HOOKS)] if settings else []
            self._trees += [(mine, name) for name in own if not is_leaf(mine[name])]
        self._objects, self._forms = self._see()

    def _see(self) -> tuple[list[Any], list[Any]]:
        """Return the objects, and the structures that hold those of the user's own attributes."""
        trees = [tree_flatten(mine.get(name)) for mine, name in self._trees]
        found = [leaf for leaves, _ in trees for leaf in (*leaves, *held_inside(leaves))]
        for place in self._places:
            found += place.values()
        return found, [form for _, form in trees]

    @property
    def same(self) -> bool:
        """Whether it still is."""
        now, forms = self._see()
        same = len(now) == len(self._objects) and all(map(operator.is_, now, self._objects))
        return same and forms == self._forms
