"""Whether two attributes of two models mean the same; what cannot be told apart from different counts as different."""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.functions import at_hand

__all__ = ["Comparison", "Names"]

Names = dict[int, str]  # from the id of a module or tensor that a model registers to its dotted name


@dataclass(frozen=True)
class Comparison:
    """Compares values found in one model with values found in another.

    Args:
        names_a, names_b: the modules and tensors that each model registers, which are compared elsewhere.
        strict: whether equal lists and dicts that functions hold on to count as different, because a function that
            runs once for all models would fill only one of them.
    """

    names_a: Names
    names_b: Names
    strict: bool = False

    def same(self, a: Any, b: Any, above: frozenset[int] = frozenset()) -> bool:
        """Say whether `a` means what `b` means; what is being compared further up is taken as same, so cycles end."""
        if a is b or id(a) in above:
            return True
        if type(a) is not type(b) and not isinstance(a, (type, nn.Module)):
            return False
        above = above | {id(a)}

        def again(x: Any, y: Any) -> bool:
            return self.same(x, y, above)

        if isinstance(a, type):
            return isinstance(b, type) and self._same_class(a, b, again)
        if id(a) in self.names_a or id(b) in self.names_b:
            return self.names_a.get(id(a)) == self.names_b.get(id(b))
        if isinstance(a, nn.Module):
            return again(type(a), type(b)) and again(vars(a), vars(b))
        if isinstance(a, Tensor):
            alike = (a.shape, a.dtype, a.device, a.layout) == (b.shape, b.dtype, b.device, b.layout)
            return alike and torch.equal(a, b)
        if isinstance(a, dict):
            return list(a) == list(b) and all(again(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple, deque)):
            return len(a) == len(b) and all(again(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, weakref.ReferenceType):
            return again(a(), b())
        if inspect.ismethod(a):
            return again(a.__func__, b.__func__) and again(a.__self__, b.__self__)
        return self._same_function(a, b, again) if inspect.isfunction(a) else _same_object(a, b, again)

    def _same_class(self, a: type, b: type, again: Any) -> bool:
        """Say whether two classes are one definition that ran twice (a class made inside a function)."""
        if (a.__module__, a.__qualname__, len(a.__bases__)) != (b.__module__, b.__qualname__, len(b.__bases__)):
            return False
        mine, others = vars(a), vars(b)
        methods = [name for name, value in mine.items() if inspect.isfunction(value)]
        alike = mine.keys() == others.keys() and all(map(again, a.__bases__, b.__bases__))
        return alike and all(again(mine[name], others[name]) for name in methods)

    def _same_function(self, a: Any, b: Any, again: Any) -> bool:
        mine, others = at_hand(a), at_hand(b)
        if a.__code__ != b.__code__ or len(mine) != len(others):
            return False
        for x, y in zip(mine, others, strict=True):
            if not again(x, y) or (self.strict and x is not y and isinstance(x, (list, dict, set, deque))):
                return False
        return again(vars(a), vars(b))


def _same_object(a: Any, b: Any, again: Any) -> bool:
    """Ask the objects themselves, or else compare what pickle would save of them."""
    if type(a).__eq__ is not object.__eq__:
        try:
            equal = a == b
            if isinstance(equal, bool):
                return equal or (a != a and b != b)  # two NaNs
            return bool(equal.all())  # numpy
        except Exception:  # a field that cannot be compared this way, such as a tensor
            pass
    try:
        parts = [x.__reduce_ex__(4) for x in (a, b)]
    except Exception:  # nothing that could be compared: a file, a lock, a random generator
        return False
    if isinstance(parts[0], str):
        return parts[0] == parts[1]
    return again(*([list(part) if hasattr(part, "__next__") else part for part in whole] for whole in parts))
