"""Stacked rules of the optimizers that take norms and products over each model's matrices; see `rules`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import States, add_, ascend, choose, count, lerp
from .each import Each
from .hyperparameters import Hyperparameters


def muon(params: Each, grads: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Muon: all models' matrices are made orthogonal at once, by batched products in bfloat16."""
    (a, b, c), smallest = h.on("ns_coefficients"), h.on("eps")
    ratios = [_muon_ratio(h.flags["adjust_lr_fn"], *param.shape[1:]) for param in params]

    def columns() -> tuple[bool | Tensor, ...]:
        rates = torch.stack([-(h["lr"] * ratio) for ratio in ratios])
        return 1 - h["momentum"], h["momentum"], 1 - h["lr"] * h["weight_decay"], rates

    for i, (take, keep, factor, rate) in enumerate(zip(*h.once("muon", columns), strict=True)):
        param, grad, buffer = params[i], grads[i], states[i]["momentum_buffer"]
        lerp(buffer, grad, take)
        update = lerp(grad.clone(), buffer, keep) if h.on("nesterov") else buffer
        tall = param.shape[1] > param.shape[2]
        x = update.bfloat16().mT if tall else update.bfloat16()
        x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=smallest))
        for _ in range(h.on("ns_steps")):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        add_(param.mul_(factor), (x.mT if tall else x).to(param.dtype), rate)


def _muon_ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns)) if adjust_lr_fn in (None, "original") else 1.0


def adafactor(params: Each, grads: Each, states: States, h: Hyperparameters) -> None:
    """Follow torch.optim.Adafactor, whose second moments are products of a column and a row, from matrices on."""
    steps, grads = count(states, "step", h), ascend(grads, h)
    eps1, eps2 = h["eps"].unbind(-1)
    eps1 = torch.where(eps1.isnan(), torch.finfo(params[0].dtype).eps, eps1)  # None stands as NaN
    roots = [param[0].numel() ** 0.5 for param in params]
    scales = torch.stack([_norm(param) / root for param, root in zip(params, roots, strict=True)])
    rates = torch.maximum(eps2, scales) * torch.minimum(h["lr"], 1 / steps**0.5)
    decay = 1 - h["lr"] * h["weight_decay"]
    decays, factors, *fixed = h.once("adafactor", lambda: (h.on("weight_decay"), decay, eps1, eps1 * eps1))
    if decays is not False:
        params.copy_(choose(decays, params * factors, params))
    columns = zip(*fixed, h.spread(steps ** h["beta2_decay"]), strict=True)
    for i, (smallest, square, part) in enumerate(columns):
        param, grad, state = params[i], grads[i], states[i]
        if param.dim() > 2:
            rows = state["row_var"]
            for kept, dim in ((rows, -1), (state["col_var"], -2)):
                lerp(kept, torch.norm(grad, dim=dim, keepdim=True).square_().div_(grad.size(dim)), part)
            update = rows @ state["col_var"]
            update.div_(rows.mean(dim=-2, keepdim=True).clamp_(min=smallest.to(rows.dtype)))
        else:
            update = lerp(state["variance"], grad * grad, part).clone()
        update.clamp_(min=square.to(update.dtype)).rsqrt_().mul_(grad)
        shrink = (_norm(update) / (roots[i] * h["d"])).clamp_(min=1.0)
        add_(param, update, h.spread(-rates[i] / shrink)[i])


def factors(shape: torch.Size) -> dict[str, torch.Size]:
    """Return the shapes of what Adafactor keeps for a lone parameter."""
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": torch.Size((*shape[:-1], 1)), "col_var": torch.Size((*shape[:-2], 1, shape[-1]))}


def _norm(stack: Tensor) -> Tensor:
    """Return the norm of each model's part of `[M, ...]`, in double."""
    return torch.linalg.vector_norm(stack.reshape(len(stack), -1), dim=1).double()
