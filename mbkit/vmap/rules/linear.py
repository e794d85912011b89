"""Linear layers: one batched product for M models, where vmap's own rule takes several operators and copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Pass, rule
from ..unwrap import call_unwrapped

VECTOR = 16  # numbers in a CPU's longest vector
_LARGE = 1 << 12  # numbers of one model, to copy which takes longer than a function of our own


@rule(torch._C._nn.linear, order=lambda input, weight, bias=None: ((input, weight, bias), {}))
def _linear(mode: Pass, operator: Any, args: tuple, kwargs: dict) -> Tensor:
    x, weight, bias = (*args, None)[:3]
    if x.dim() < 2:
        return NotImplemented

    def run(stacks: list[Tensor], stacked: list[bool]) -> Tensor:
        x, weight, *biases = stacks
        if not all(stacked[1:]) or weight.dim() != 3:
            return NotImplemented
        x = x if stacked[0] else x.expand(mode.num_models, *x.shape)
        rows = x.flatten(1, -2) if x.dim() > 3 else x
        if mode.traced and biases:
            out = _Turned.apply(rows, weight, *biases)
        elif weight.requires_grad and weight[0].numel() >= _LARGE:
            out = _Linear.apply(rows, weight, *biases)
        else:
            out = _product(rows, weight, *biases)
        return out.unflatten(1, x.shape[1:-1]) if x.dim() > 3 else out

    return call_unwrapped(mode, run, [x, weight] if bias is None else [x, weight, bias])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    turned = weight.transpose(1, 2)
    return torch.bmm(x, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, turned)


class _Linear(torch.autograd.Function):
    """The same, from `[M, B, K]` to `[M, B, N]`, with a weight's gradient that lies in memory as the weight does.

    torch would make it turned around, and copy it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, *of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if of_x else None,
            torch.bmm(gradient.transpose(1, 2), x) if of_weight else None,
            *(gradient.sum(1) if wanted else None for wanted in of_bias),
        )


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
