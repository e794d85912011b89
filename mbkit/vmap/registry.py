"""What a rule is told about the pass of M models in which it is called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Pass"]


class Pass(Protocol):
    """One pass of M models; a rule is a function of it, the operator, its arguments and its keyword arguments.

    Attributes:
        index: `torch.arange(M)` as one model sees it under vmap, i.e. its own number.
        index_values: `[M]`, what a rule returns from below vmap when it has nothing to return.
        num_models: M.
        streams: the models' random generators.
        device: where the models are.
        folding, folded: whether convolutions may fold the models into their channels, and whether one has.
        copies: storages of copies of what is a view alone.
        off: a context in which every call passes.
        check_hooks: refuses hooks that the model itself has put on saved tensors.
    """

    index: Tensor
    index_values: Tensor
    num_models: int
    streams: Any
    device: torch.device
    folding: bool
    folded: bool
    copies: set[int]
    off: Callable[[], AbstractContextManager[None]]
    check_hooks: Callable[[], None]
