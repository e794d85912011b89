"""Which layer raised: read off the traceback, so that it costs nothing while all goes well."""

from __future__ import annotations

import operator
from types import TracebackType
from typing import Any

from torch import nn


class BatchingError(RuntimeError):
    """A layer cannot do for M models at once what it does for one; the message names the layer and the way out."""


class WholeInTurn(BatchingError):
    """No single layer can be run in turn for it to come right: the whole model has to."""


class ClosedOutput(BatchingError):
    """A model returns or keeps an object that is not taken apart: one for all models is not each model's own."""


class SharedInput(BatchingError):
    """Derivatives are asked for with respect to what all models share; rows of each model's own would have them."""

    def __init__(self) -> None:
        super().__init__("it takes derivatives with respect to a tensor that all models share")


PATH = "mbkit_path"  # on a module copy: the dotted path of the module that it copies
_CALLS = {"_call_impl": "self", "call_named": "module"}  # functions, and the variable in which they hold their module


def call_named(module: nn.Module, name: str, args: tuple, kwargs: dict) -> Any:
    """Call a method or a submodule by its dotted name; "" for the module itself."""
    return (operator.attrgetter(name)(module) if name else module)(*args, **kwargs)


def has_method(module: nn.Module, name: str) -> bool:
    """Say whether `call_named` finds something to call."""
    try:
        return callable(operator.attrgetter(name)(module))
    except AttributeError:
        return False


def running_modules(traceback: TracebackType | None) -> list[nn.Module]:
    """Return the module copies whose calls an exception has come through, outermost first."""
    found = []
    while traceback is not None:
        frame = traceback.tb_frame
        owner = frame.f_locals.get(_CALLS.get(frame.f_code.co_name))
        if isinstance(owner, nn.Module) and PATH in vars(owner):
            found.append(owner)
        traceback = traceback.tb_next
    return found


def module_path(module: nn.Module) -> str:
    """Return a module copy's dotted path and class, e.g. "'encoder.0' (Linear)"."""
    path = vars(module)[PATH]
    return f"'{path}' ({type(module).__name__})" if path else f"the model itself ({type(module).__name__})"
