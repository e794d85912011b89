"""Which layer raised: read off the traceback, so that it costs nothing while all goes well."""

from __future__ import annotations

from types import TracebackType

from torch import nn

__all__ = ["BatchingError", "module_path"]


class BatchingError(RuntimeError):
    """A layer cannot do for M models at once what it does for one; the message names the layer and the way out."""


def module_path(traceback: TracebackType | None, model: nn.Module) -> str:
    """Return the dotted path and class of the innermost module of `model` that was running, e.g. "encoder.0 (Linear)".

    Args:
        traceback: of the exception.
        model: the root; its own path reads "the model itself".
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found = model
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if id(owner) in paths:
            found = owner
        traceback = traceback.tb_next
    path = paths[id(found)]
    return f"'{path}' ({type(found).__name__})" if path else f"the model itself ({type(found).__name__})"
