"""Methods and submodules of the models, called for all of them at once."""

from __future__ import annotations

import operator
from functools import cache, partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..common.checks import flag
from ..common.functions import user_made
from ..vmap import OnStack
from .call import call_models
from .context import CallContext, context_of


class CanCall:
    """The part of a ModelBatch that calls the models' methods and submodules."""

    def call(self, name: str, /, *inputs: Any, shared_input: bool | None = None, **kwargs: Any) -> Any:
        """Call a method or a submodule of all models, each as it does alone: its weights, its random numbers.

        `batch.encode(x)` is short for `batch.call("encode", x)`, `batch.encoder(x)` for `batch.call("encoder", x)`,
        and `batch.encoder.embed(x)` for `batch.call("encoder.embed", x)`. The long form is for names that the batch
        has itself ("select"). What torch.vmap cannot run (`generate`) runs for one model after the other.
        As alone, only the submodules' hooks run, and not those of the whole model, unless the method calls it.

        Args:
            name: of the method or the submodule, dotted.
            *inputs, **kwargs: what it takes; tensors are `[B, ...]` for all models or `[M, B, ...]`.
            shared_input: which of the two; by default the batch's own. What a call has returned is `[M, B, ...]`.

        Returns:
            What the method returns, each tensor in it `[M, ...]`; the batch, or its submodule, where it returns those.

        Raises:
            AttributeError: the models have no such method or submodule.
            ValueError: `shared_input` is not given, and an input `[M, ...]` comes from a call of the batch.
            RuntimeError: a method that runs model by model changes `requires_grad`: call the batch's own
                `batch.encoder.requires_grad_(False)` for that.
            TypeError, BatchingError: as for a call of the batch.

        Example:
            >>> import torch
            >>> from mbkit import ModelBatch
            >>> class Coder(nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.down, self.up = nn.Linear(3, 2), nn.Linear(2, 3)
            ...     def encode(self, x):
            ...         return self.down(x).tanh()
            >>> batch, x = ModelBatch([Coder() for _ in range(4)]), torch.randn(8, 3)
            >>> codes = batch.encode(x)
            >>> outputs = batch.up(codes, shared_input=False)  # each model its own codes
            >>> tuple(codes.shape), tuple(outputs.shape)
            ((4, 8, 2), (4, 8, 3))

            So a loop of one's own trains through methods:

            >>> batch.compute_loss(outputs, x, nn.functional.mse_loss).backward()
        """
        output = _call(context_of(self), name, *inputs, shared_input=shared_input, **kwargs)
        template = context_of(self).template
        self.training = template.training  # a method may call `eval`
        return self if output is template else output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            template = self.__dict__["_context"].template if "_context" in self.__dict__ else None
            own = None if name.startswith("__") else getattr(type(template), name, None)
            if callable(own) and not isinstance(own, type):
                return partial(self.call, name)
            if own is None and name not in getattr(template, "__dict__", ()):
                raise
            told = f"'{name}' of {type(template).__name__} is not a method, and may be another for each model"
            raise AttributeError(f"{told}: use batch[m].{name}.") from None


def stand_for_parts(context: CallContext) -> None:
    """Have submodules that hold stacks, and their methods, call all models: they would take stacks for one model's."""
    for path, module in context.template.named_modules():
        if path:
            vars(module)["_call_impl"] = OnStack(_call, context, path)
            for name in _methods_of(type(module)):
                vars(module)[name] = OnStack(_call, context, f"{path}.{name}")


@cache
def _methods_of(kind: type) -> list[str]:
    """Return the methods that a module has from its user's classes, but for those that every module has."""
    found = {name: held for base in kind.__mro__ if user_made(base) for name, held in vars(base).items()}
    named = {"forward", *(name for name in found if not name.startswith("__") and not hasattr(nn.Module, name))}
    return [name for name in named if isinstance(found.get(name), FunctionType)]


def _call(context: CallContext, name: str, /, *inputs: Any, shared_input: bool | None = None, **kwargs: Any) -> Any:
    template, num_models = context.template, context.num_models
    if not callable(operator.attrgetter(name)(template)):
        raise AttributeError(f"'{name}' of {type(template).__name__} is neither a method nor a submodule.")
    shared = context.shared_input if shared_input is None else flag(shared_input, "shared_input")
    if shared and shared_input is None:
        for tensor in tree_leaves((inputs, kwargs)):
            stacked = isinstance(tensor, Tensor) and tensor.dim() > 0 and len(tensor) == num_models
            if stacked and (tensor.grad_fn is not None or any(tensor is known() for known in context.returned)):
                told = f"'{name}' gets an input {list(tensor.shape)} that seems computed for all {num_models} models"
                raise ValueError(f"{told}: pass shared_input=False if each is to get its own slice, else True.")
    context.streams.meet(name)
    return call_models(context, inputs, kwargs, shared, method=name)
