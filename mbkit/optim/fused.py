"""Adam and AdamW of larger models, or of few: torch's own fused kernel, called once a model on rows of the tensors.

The stacked rules pass over each tensor about nine times; where a model's tensors leave the cache, one pass is faster
than the calls that it costs: 1.5 times for 16 LeNets of 62,006 parameters, on 2 cores. For two or three models its
calls are fewer than the rule's, too; for many small ones the rule is far ahead. The kernel rounds otherwise than
torch's for-loop, to the last bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .hyperparameters import Columns

__all__ = ["FusedAdam", "can_fuse"]

_WORTH = 16_384  # parameters of one model
_KERNELS = {torch.optim.Adam: "_fused_adam_", torch.optim.AdamW: "_fused_adamw_"}


def can_fuse(
    optimizer_cls: type[torch.optim.Optimizer], params: Sequence[Tensor], columns: Columns, one_by_one: bool
) -> bool:
    """Say whether the kernel knows this update and is faster: on a CPU, for large float32 models or one by one."""
    first = params[0]
    return (
        optimizer_cls in _KERNELS
        and first.device.type == "cpu"
        and first.dtype == torch.float32
        and (one_by_one or sum(p.numel() for p in params) >= _WORTH * len(columns.groups))
        and all(columns.on(name) is False for name in ("amsgrad", "maximize"))
        and (optimizer_cls is torch.optim.AdamW or not _decoupled(columns))
        and not any(group.get("fused") is False for group in columns.groups)
    )


def _decoupled(columns: Columns) -> bool:
    name = "decoupled_weight_decay"  # Adam has it since torch 2.7
    return name in columns.names and columns.on(name) is not False


class FusedAdam:
    """Updates parameters `[M, ...]` in place, model by model; their rows are made once.

    Args:
        optimizer_cls: Adam or AdamW.
    """

    def __init__(self, optimizer_cls: type[torch.optim.Optimizer]) -> None:
        self._kernel = getattr(torch, _KERNELS[optimizer_cls])
        self._places: list[int] = []
        self._rows: list[list[list[Tensor]]] = []  # for each model: parameters, two moments, steps

    def update(
        self,
        params: Sequence[nn.Parameter],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        columns: Columns,
    ) -> None:
        """Make a step of each model."""
        self._keep_up([params, *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))])
        torch._foreach_add_([state["step"] for state in states], 1)
        gradients = zip(*(grad.unbind(0) for grad in grads), strict=True)
        for (own, first, second, steps), grad, group in zip(self._rows, gradients, columns.groups, strict=True):
            beta1, beta2 = group["betas"]
            settings = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
            self._kernel(
                own, grad, first, second, [], steps, **settings, eps=group["eps"], amsgrad=False, maximize=False
            )

    def _keep_up(self, kinds: Sequence[Sequence[Tensor]]) -> None:
        """Make the rows, unless those at hand are these tensors': they hold the memory, so no other can be there."""
        places = [tensor.data_ptr() for kind in kinds for tensor in kind]
        if places != self._places:
            self._places = places
            rows = [[tensor.unbind(0) for tensor in kind] for kind in kinds]
            self._rows = [[[row[m] for row in kind] for kind in rows] for m in range(len(kinds[0][0]))]
