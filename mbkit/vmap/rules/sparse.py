"""Products with a sparse matrix, such as the edges of a graph: one for all models, where vmap needs dense tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..in_turn import model_by_model
from ..registry import Pass, rule
from ..unwrap import as_stacked, call_unwrapped


@rule(torch.matmul, torch.mm, torch.spmm, torch.sparse.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)
def _product(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Any:
    """Multiply a matrix that all models share with those of all models side by side."""
    if len(args) != 2 or kwargs or args[0].layout is torch.strided:
        return NotImplemented
    if args[0].requires_grad or args[1].dim() != 2 or as_stacked(args[0]) is not None or as_stacked(args[1]) is None:
        return model_by_model(mode, operator, args, kwargs)

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        columns = operator(stacks[0], stacks[1].movedim(0, 1).flatten(1))  # [N, M * F]
        return columns.unflatten(1, (mode.num_models, -1)).movedim(1, 0)

    return call_unwrapped(mode, run, args)
