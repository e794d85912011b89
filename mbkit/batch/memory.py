"""What calls may change of the models, to undo it when a call has to start again or is refused."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..vmap import HOOKS, LayoutMatters, State, version, write_state
from .context import CallContext


class Memory:
    """What calls may change of the models: tensors, attributes, hooks, random streams.

    Only tensors that calls have been seen to edit are copied, once the first call has shown which those are.

    Args:
        context: the models.
        before: their state.
        method: what of them is called, as for `call_models`.
    """

    def __init__(self, context: CallContext, before: State, method: str = "") -> None:
        self.context, self.before, self.attributes = context, before, context.attributes
        flags = method, *(module.training for module in before.modules.values())
        self.steady: dict[int, weakref.ref] = context.steady.setdefault(flags, {})
        self.streams, self.next_hook = context.streams.remember(), RemovableHandle.next_id
        self.tensors = [(t, version(t), None if self._is_steady(t) else t.detach().clone()) for t in before.tensors]

    def _is_steady(self, tensor: Tensor) -> bool:
        known = self.steady.get(id(tensor))  # an id may be that of a tensor long gone
        return known is not None and known() is tensor

    def undo(self, error: Exception) -> bool:
        """Put everything back, or say that an error of the user's own came after an edit, which stays, as alone.

        Raises:
            RuntimeError: an edit cannot be undone, and the error may not be the user's own.
        """
        self.streams()
        template, changed = self.context.template, None
        for hooks in (getattr(module, name) for module in template.modules() for name in HOOKS):
            for new in [key for key in hooks if key >= self.next_hook]:  # a call that is cut short has left them there
                del hooks[new]
        for tensor, was, copied in self.tensors:
            if copied is not None and copied.shape == tensor.shape:
                tensor.data.copy_(copied)
            elif copied is not None:  # a call has given it another size
                tensor.data = copied
            elif version(tensor) != was:
                changed = tensor
        write_state(State(template), self.before)
        self.context.attributes = self.attributes
        if changed is not None and isinstance(error, (RuntimeError, LayoutMatters)):
            states = self.before.items()
            path, _, name = next(key for key, value in states if any(t is changed for t in tree_leaves(value)))
            where = f"'{path}.{name}'" if path else f"'{name}'"
            told = f"A call failed after it had changed {where}, which earlier calls did not change, so without a copy"
            told += f" ({error}): load the last checkpoint, and pass model_by_model=[{path!r}] to ModelBatch."
            raise RuntimeError(told) from error
        return changed is None

    def learn(self) -> None:
        """Note the tensors that the call has left as they were, so that the next calls need no copies of them."""
        for tensor, was, copied in self.tensors:
            if version(tensor) != was:
                self.steady.pop(id(tensor), None)
            elif copied is None or tensor.layout is not torch.strided or tensor.is_meta:
                continue  # there is nothing to compare
            elif torch.equal(tensor, copied):
                self.steady[id(tensor)] = weakref.ref(tensor)  # compared, for BatchNorm's kernels count no versions
