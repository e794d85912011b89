"""Linear layers: one batched product for M models, where vmap's own rule takes several operators and copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Pass, rule
from ..unwrap import call_unwrapped

VECTOR = 16  # numbers in a CPU's longest vector


@rule(torch._C._nn.linear, order=lambda input, weight, bias=None: ((input, weight, bias), {}))
def _linear(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    x, weight, bias = (*args, None)[:3]
    if bias is None or x.dim() < 2:
        return NotImplemented

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        x, weight, bias = stacks
        if not (stacked[1] and stacked[2] and weight.dim() == 3):
            return NotImplemented
        x = x if stacked[0] else x.expand(mode.num_models, *x.shape)
        rows = x.flatten(1, -2) if x.dim() > 3 else x
        if mode.traced:
            out = _Turned.apply(rows, weight, bias)
        else:
            out = torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))
        return out.unflatten(1, x.shape[1:-1]) if x.dim() > 3 else out

    return call_unwrapped(mode, run, [x, weight, bias])


class _Turned(torch.autograd.Function):
    """The same in a step that is compiled, from `[M, B, K]` to `[M, B, N]`, in the order that inductor makes fast.

    A weight's gradient lies in memory as the weight does, so the update reads both in vectors. A bias's gradient is
    summed over all models at once: where N is less than a vector's length, inductor would start its threads anew for
    each model. The bias is added in one loop with what follows; baddbmm would first copy it to each row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (torch.bmm(weight, x.transpose(1, 2)) + bias.unsqueeze(2)).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), turned = ctx.saved_tensors, gradient.transpose(1, 2)
        of_x = torch.bmm(weight.transpose(1, 2), turned).transpose(1, 2) if ctx.needs_input_grad[0] else None
        if turned.shape[1] < VECTOR:
            return of_x, torch.bmm(turned, x), turned.reshape(-1, turned.shape[2]).sum(1).view(turned.shape[:2])
        return of_x, torch.bmm(turned, x), gradient.sum(1)
