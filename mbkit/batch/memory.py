"""What a call may change in place, to undo it when the call has to start again."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..vmap import HOOKS, LayoutMatters, State, tensors_in
from .context import CallContext

__all__ = ["Memory"]


class Memory:
    """What a call may change in place, to undo it when the call has to start again.

    Only tensors that calls have been seen to edit are copied, once the first call has shown which those are.
    """

    def __init__(self, context: CallContext, before: State) -> None:
        modules = [vars(module) for module in context.template.modules()]
        flags = tuple(mine["training"] for mine in modules)
        self.hooks = [(mine[name], dict(mine[name])) for mine in modules for name in HOOKS]
        self.before = before
        self.steady: dict[int, weakref.ref] = context.steady.setdefault(flags, {})
        self.streams = context.streams.remember()
        self.tensors = [
            (t, _version(t), None if self._is_steady(t) else t.detach().clone()) for t in tensors_in(before)
        ]

    def _is_steady(self, tensor: Tensor) -> bool:
        known = self.steady.get(id(tensor))  # an id may be that of a tensor long gone
        return known is not None and known() is tensor

    def undo(self, error: Exception) -> bool:
        """Put everything back, or say that an error of the user's own came after an edit, which stays, as alone.

        Raises:
            RuntimeError: an edit cannot be undone, and the error may not be the user's own.
        """
        self.streams()
        for hooks, given in self.hooks:
            if hooks.keys() != given.keys():  # a forward that is cut short has not taken its hooks away
                hooks.clear()
                hooks.update(given)
        changed = None
        for tensor, version, copied in self.tensors:
            if copied is not None and copied.shape == tensor.shape:
                tensor.data.copy_(copied)
            elif copied is not None:  # a call has given it another size
                tensor.data = copied
            elif _version(tensor) != version:
                changed = tensor
        if changed is not None and isinstance(error, (RuntimeError, LayoutMatters)):
            states = self.before.items()
            path, _, name = next(key for key, value in states if any(t is changed for t in tree_leaves(value)))
            where = f"'{path}.{name}'" if path else f"'{name}'"
            raise RuntimeError(
                f"A call failed after it had changed {where}, which earlier calls did not change, so there is no copy "
                f"to undo it ({error}): load the last checkpoint, and pass model_by_model=[{path!r}] to ModelBatch."
            ) from error
        return changed is None

    def learn(self) -> None:
        for tensor, version, copied in self.tensors:
            if _version(tensor) != version:
                self.steady.pop(id(tensor), None)
            elif copied is not None and _can_compare(tensor) and torch.equal(tensor, copied):
                self.steady[id(tensor)] = weakref.ref(tensor)  # compared, for BatchNorm's kernels count no versions


def _can_compare(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
