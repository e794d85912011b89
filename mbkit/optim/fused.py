"""Adam and AdamW of larger models, or of few: torch's own fused kernel, called once per model on rows of the tensors.

The stacked rules pass over each tensor about nine times. Where a model's tensors leave the cache, one pass is faster
than the calls that it costs: 1.5 times for 16 LeNets of 62,006 parameters, on 2 cores. For two or three models its
calls are fewer than the rule's, too; for many small ones the rule is far ahead. The kernel's last bits differ from
those of torch's for-loop.

The kernel walks raw memory and looks at no stride, so `can_fuse` asks at every step what it takes for granted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .hyperparameters import Columns, OptimizerClass

_WORTH = 16_384  # parameters of one model
_FEW = 3  # models


def prefers_kernel(optimizer_cls: OptimizerClass, params: Sequence[Tensor], columns: Columns) -> bool:
    """Say whether the kernel knows this update and is faster: for models that are large or few, or had it before."""
    num_models = len(columns.groups)
    return (
        optimizer_cls in (torch.optim.Adam, torch.optim.AdamW)
        and columns.fused is not False
        and (columns.fused or num_models <= _FEW or sum(p.numel() for p in params) >= _WORTH * num_models)
        and all(columns.on(name) is False for name in ("amsgrad", "maximize"))
        and columns.on("decoupled_weight_decay") is not None
    )


def can_fuse(
    optimizer_cls: OptimizerClass, params: Sequence[Tensor], states: Sequence[dict[str, Tensor]], columns: Columns
) -> bool:
    """Say whether the kernel is to be used, and can be: on a CPU, for float32 tensors."""
    return (
        prefers_kernel(optimizer_cls, params, columns)
        and all(map(_is_plain, params))
        and all(state["step"].dtype == torch.float32 and state["step"].is_contiguous() for state in states)
    )


def _is_plain(param: Tensor) -> bool:
    """Say whether each model's row is one block of float32 numbers in the CPU's memory."""
    row = param[0]
    return (
        param.device.type == "cpu"
        and param.dtype == torch.float32
        and not param.is_neg()
        and param.stride(0) >= row.numel()
        # What torch makes like it is one block, with the row's strides if the row is one.
        and (row.is_contiguous() or torch.empty_like(row, device="meta").stride() == row.stride())
    )


def fused_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    columns: Columns,
    active: Sequence[Tensor | None],
) -> None:
    """Make a step of each model: change parameters and states `[M, ...]` in place.

    Args:
        params, grads, states: of P parameters, for which the kernel `can_fuse`.
        columns: the models' hyperparameters.
        active: for each parameter the models `[M]` that change it, or None for all.
    """
    kernel = torch._fused_adamw_ if columns.on("decoupled_weight_decay") else torch._fused_adam_
    for param, state, who in zip(params, states, active, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = _laid_out_as(param, state[name])
        state["step"].add_(1 if who is None else who)
    kinds = [params, [_laid_out_as(param, grad) for param, grad in zip(params, grads, strict=True)]]
    kinds += [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
    rows = [[tensor.unbind(0) for tensor in kind] for kind in kinds]
    takes_part = [[True] * len(columns.groups) if who is None else who.tolist() for who in active]
    for m, group in enumerate(columns.groups):
        chosen = [i for i, models in enumerate(takes_part) if models[m]]
        if chosen:
            own, grad, first, second, steps = ([kind[i][m] for i in chosen] for kind in rows)
            (beta1, beta2), numbers = group["betas"], {name: group[name] for name in ("lr", "weight_decay", "eps")}
            kernel(
                own, grad, first, second, [], steps,
                beta1=beta1, beta2=beta2, amsgrad=False, maximize=False, **numbers,
            )  # fmt: skip


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor of the parameter's shape with its numbers in the parameter's order, or itself where they are."""
    same = tensor.shape == param.shape and tensor.stride() == param.stride() and tensor.dtype == param.dtype
    if same and not tensor.is_neg():
        return tensor
    return torch.empty_strided(param.shape, param.stride(), dtype=param.dtype).copy_(tensor)
