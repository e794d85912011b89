"""The one interception: every torch call of the M models passes here before vmap sees it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .autocast import call_cast
from .errors import BatchingError
from .operator_loop import edits_in_place, model_by_model
from .per_model import PerModel
from .rules import activations, convolution, embedding, linear, losses, pooling, randomness, recurrent
from .rules import data_dependent as reads
from .streams import Streams

__all__ = ["Interception"]

_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
RULES = linear.RULES | losses.RULES | convolution.RULES | randomness.RULES
RULES |= recurrent.RULES | embedding.RULES | reads.RULES | activations.RULES
_TAKE_PER_MODEL = {torch.dropout, *recurrent.RULES}


@cache
def _opened(function: types.FunctionType) -> types.FunctionType:
    """Return a function of `torch.nn.functional` that no longer offers itself to modes, so that its body runs.

    torch takes a mode away while its handler runs, so a composite such as `multi_head_attention_forward` has
    to be entered with the mode on; its first line would then offer it to the mode again, for ever.
    """
    deaf = {name: lambda *_: False for name in vars(functional) if name.startswith("has_torch_function")}
    cells = tuple(
        types.CellType(_opened(cell.cell_contents)) if _is_composite(cell.cell_contents) else cell
        for cell in function.__closure__ or ()
    )
    opened = types.FunctionType(
        function.__code__, {**function.__globals__, **deaf}, function.__name__, function.__defaults__, cells
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def _is_composite(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and function.__module__ == functional.__name__


class Interception(TorchFunctionMode):
    """Routes the calls that vmap gets wrong to their rules, for one pass of M models.

    Args:
        index: `torch.arange(M)` as one model sees it under vmap, i.e. its own number.
        num_models: M.
        streams: the models' random generators.
        device: where the models are.
        per_model_settings: whether a module or the loss has a `PerModel` setting; spares looking for them otherwise.
        folding: whether convolutions may fold the models into their channels.
        traced: whether the pass is traced to be compiled, so that some rules emit what the compiler makes fast.
    """

    def __init__(
        self,
        index: Tensor,
        num_models: int,
        streams: Streams,
        device: torch.device,
        per_model_settings: bool,
        folding: bool,
        traced: bool = False,
    ) -> None:
        super().__init__()
        self.index = index
        self.num_models = num_models
        self.streams = streams
        self.device = device
        self.per_model_settings = per_model_settings
        # With one model a folded activation could not be told from a channels_last one, and gains nothing.
        self.folding = folding and num_models > 1 and device.type == "cpu"
        self.folded = False  # whether a convolution has folded in this pass
        self.traced = traced
        self.rectified: dict[int, tuple] = {}  # of a traced pass; see rules/pooling
        self.paused = False
        self.hooks = _saved_tensors_hooks(True)  # those of the caller's, which pack whole stacks
        self.copies: set[int] = set()  # storages of copies that are views alone
        self.index_values = torch.arange(num_models, device=device)  # what a rule returns when it has nothing to

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let every call pass, while the models run one after the other on tensors of their own.

        With no mode on at all: torch's encoder layers take another path where they see one.
        """
        self.paused = True
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self.paused = False

    def check_hooks(self) -> None:
        """Refuse to go on under hooks that the model itself has put on saved tensors."""
        if _saved_tensors_hooks(True) != self.hooks:
            raise BatchingError(
                "it uses torch.utils.checkpoint or saved_tensors_hooks, which compute again during the backward pass, "
                "when the M models are no longer apart: name the layer in model_by_model=[...]"
            )

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return function(*args, **kwargs)
        self.check_hooks()
        if _is_composite(function):
            with self:
                return _opened(function)(*args, **kwargs)
        if self.copies and edits_in_place(function):
            convolution.check_edit(self, args)
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(self.device.type):
            return call_cast(self.device.type, self._apply_rule, function, args, kwargs)
        return self._apply_rule(function, args, kwargs)

    def _apply_rule(self, function: Any, args: tuple, kwargs: dict) -> Any:
        if self.traced and function in pooling.RULES_WHEN_TRACED:
            result = pooling.RULES_WHEN_TRACED[function](self, function, args, kwargs)
            if result is not NotImplemented:
                return result
        leaves = tree_leaves((args, kwargs)) if self.per_model_settings and function not in _TAKE_PER_MODEL else ()
        if any(isinstance(leaf, PerModel) for leaf in leaves):
            return model_by_model(self, function, args, kwargs)
        rule = RULES.get(function)
        return function(*args, **kwargs) if rule is None else rule(self, function, args, kwargs)
