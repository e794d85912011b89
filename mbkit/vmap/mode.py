"""The one place where rules are looked up: every torch call of the M models passes here before vmap sees it."""

from __future__ import annotations

import types
from functools import cache, partial
from typing import Any

import torch
from torch._C import _functorch as functorch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .autocast import call_cast
from .in_turn import edits_in_place, model_by_model
from .layout import LayoutMatters, check_edit
from .per_model import PerModel
from .registry import RULES, RULES_INSIDE, RULES_WHEN_TRACED, RULES_WITH_SETTINGS, Pass, in_order
from .unwrap import own_rows


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
    names = {**function.__globals__, **deaf}
    opened = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def _is_composite(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and function.__module__ == functional.__name__


def _relu(input: Any, inplace: bool = False) -> tuple | None:
    return None if inplace else (torch.relu, input)


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple | None:
    return None if inplace or p < 0 or p > 1 else (torch.dropout, input, p, training)


# What functions of `torch.nn.functional` that small networks call do with such arguments: to open these would take
# longer than the operators. None where there is more to do.
_THIN = {functional.relu: _relu, functional.dropout: _dropout}


def _have_settings(values: list | tuple) -> bool:
    return any(type(v) is PerModel or (isinstance(v, (list, tuple)) and _have_settings(v)) for v in values)


_LAST = (torch.channels_last, torch.channels_last_3d)


class RuleMode(TorchFunctionMode):
    """Routes the calls that vmap gets wrong to their rules, for one pass of M models."""

    def __init__(self, models: Pass) -> None:
        super().__init__()
        self.models = models

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, models = kwargs or {}, self.models
        models.check_hooks()
        if models.own_rows:
            args, kwargs = tree_map_only(torch.Tensor, partial(own_rows, models), (args, kwargs))
        if _is_composite(function):
            inner = _THIN[function](*args, **kwargs) if function in _THIN else None
            if inner is None:
                with self:
                    return _opened(function)(*args, **kwargs)
            (function, *args), kwargs = inner, {}
        if kwargs.get("memory_format") in _LAST and function is not torch.Tensor.is_contiguous:
            models.channels_last = True  # from here on an activation's order is known in no pass that folds
            if models.folded:
                raise LayoutMatters
        if models.copies and edits_in_place(function):
            check_edit(models, args)
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(models.device.type):
            return call_cast(models.device.type, self._apply_rule, function, args, kwargs)
        return self._apply_rule(function, args, kwargs)

    def _apply_rule(self, function: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs = in_order(function, args, kwargs) if kwargs else (args, kwargs)
        if functorch.maybe_current_level() != self.models.level:
            rules = [RULES_INSIDE.get(function)]
        elif self.models.per_model_settings and _have_settings((*args, *kwargs.values())):
            rules = [RULES_WITH_SETTINGS.get(function), model_by_model]
        else:
            rules = [RULES_WHEN_TRACED.get(function) if self.models.traced else None, RULES.get(function)]
        for rule in rules:
            result = NotImplemented if rule is None else rule(self.models, function, args, kwargs)
            if result is not NotImplemented:
                return result
        return function(*args, **kwargs)
