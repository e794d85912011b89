"""Views, copies and edits in place, in drawn order: what shares memory alone shares it in a batch, or runs in turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracle import close
from torch import Tensor, nn

from mbkit import ModelBatch

M, B, K = 3, 4, 4

# What activations begin as, from an input `[B, K]` and a model's own weight `[K, K]`; vmap lays them out in many ways.
BEGINNINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, w: x @ w,
    "turned product": lambda x, w: (x @ w).T,
    "outer product": lambda x, w: torch.einsum("bi,ij->bij", x, w),
    "turned sum": lambda x, w: torch.einsum("bi,ij->jb", x, w),
    "broadcast": lambda x, w: (x.unsqueeze(1) * w).transpose(1, 2),
    "convolution": lambda x, w: torch.conv1d(x.unsqueeze(1), w[:, None, :3]),
    "weight": lambda x, w: w * 1,
    "input": lambda x, w: x * 1,
}

# Each from a tensor of at least one dimension to another, perhaps a view of it or the very same.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda h: h.reshape(-1, h.shape[-1]),
    "flat": lambda h: h.flatten(),
    "ravelled": lambda h: h.ravel(),
    "contiguous": lambda h: h.contiguous(),
    "of a type": lambda h: h.to(torch.float64),
    "like another": lambda h: h.reshape_as(h.detach()),
    "repeated": lambda h: h.expand(2, *h.shape),
    "expanded": lambda h: h.expand_as(h),
    "turned": lambda h: h.transpose(0, -1),
    "turned and back": lambda h: h.transpose(0, -1).contiguous().transpose(0, -1),
    "flat, turned": lambda h: h.movedim(0, -1).flatten(),
    "einsum": lambda h: torch.einsum("...i->i...", h),
    "part": lambda h: h[..., :1],
    "first": lambda h: h[:1],
    "every other": lambda h: h[::2],
    "one more dimension": lambda h: h.unsqueeze(0),
    "diagonal": lambda h: h.diagonal(0, 0, -1) if h.dim() > 1 else h,
    "selected": lambda h: h.index_select(0, torch.arange(len(h))),
    "joined": lambda h: torch.cat([h]),
    "rolled": lambda h: h.roll(1, 0),
    "detached": lambda h: h.detach(),
    "tanh": lambda h: h.tanh(),
    "doubled": lambda h: h + h.detach(),
}
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda h: h.mul_(1.5),
    "rectified": lambda h: h.relu_(),
    "last number": lambda h: h[..., -1].add_(1),
    "first row": lambda h: h[:1].mul_(2),
    "an entry set": lambda h: h.__setitem__(0, 1.0),
    "copied over": lambda h: h.copy_(h.detach().flip(-1) + h),
    "through flatten": lambda h: h.flatten().add_(1),
    "through flatten by name": lambda h: torch.flatten(input=h).add_(1),
    "through reshape": lambda h: h.reshape(-1).mul_(2),
    "through a turn": lambda h: h.transpose(0, -1).mul_(1.1),
    "filled": lambda h: h.masked_fill_(h.detach() > 1, 0.5),
    "turned over": lambda h: h.transpose_(0, -1),
    "multiplied up": lambda h: h.cumprod_(0),
    "hypotenuse": lambda h: h.hypot_(h.detach()),
    "doubled bits": lambda h: h.ldexp_(torch.ones_like(h)),
    "put": lambda h: h.put_(torch.tensor([0]), torch.tensor([0.3], dtype=h.dtype)),
}


class Drawn(nn.Module):
    """Each step takes one of the three latest results; what comes out depends on every number of all of them."""

    def __init__(self, beginning: str, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.w, self.beginning, self.steps = nn.Parameter(torch.randn(K, K).double()), beginning, steps

    def forward(self, x: Tensor) -> Tensor:
        made = [BEGINNINGS[self.beginning](x, self.w)]
        for name, back in self.steps:
            h = made[-1 - min(back, len(made) - 1)]
            if name in EDITS:
                EDITS[name](h)
            else:
                made.append(STEPS[name](h))
        weights = [torch.linspace(0.5, 1, h.numel()).double().view(h.shape) for h in made]
        return sum((h * weight).sum() for h, weight in zip(made, weights, strict=True))


@pytest.mark.filterwarnings("ignore:Use of .* on expanded tensors is deprecated")
@pytest.mark.filterwarnings("ignore:The whole model runs model by model")
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    beginning=st.sampled_from(sorted(BEGINNINGS)),
    steps=st.lists(st.tuples(st.sampled_from(sorted([*STEPS, *EDITS])), st.integers(0, 2)), min_size=2, max_size=7),
    own=st.booleans(),
)
@example(  # vmap lays the sum out in another order than it has alone, in which its reshape is a copy
    beginning="convolution", steps=[("repeated", 0), ("doubled", 0), ("through reshape", 0)], own=False
)
@example(beginning="convolution", steps=[("repeated", 0), ("doubled", 0), ("through flatten by name", 0)], own=False)
@example(  # vmap would keep the edited tensor for the backward pass
    beginning="product", steps=[("selected", 0), ("scaled", 1)], own=False
)
def test_drawn_views_and_edits(beginning: str, steps: list[tuple[str, int]], own: bool) -> None:
    torch.manual_seed(0)
    models = [Drawn(beginning, steps) for _ in range(M)]
    x = torch.randn(*([M] if own else []), B, K).double()
    try:
        losses = [model(x[m] if own else x) for m, model in enumerate(models)]
        gradients = torch.autograd.grad(sum(losses), [model.w for model in models], materialize_grads=True)
    except RuntimeError:
        assume(False)  # alone it cannot be trained
        raise
    batch = ModelBatch(models, shared_input=not own)
    outputs = batch(x)
    close(outputs, torch.stack(losses))
    (gradient,) = torch.autograd.grad(outputs.sum(), list(batch.parameters()), materialize_grads=True)
    close(gradient, torch.stack(gradients))


RELAID: dict[str, Callable[[Tensor], Tensor]] = {
    "as_strided_": lambda h: (h * 1).as_strided_((K, 2), (1, K)),
    "as_strided_ of a part": lambda h: (h * 1)[1:3].as_strided_((2,), (1,)),
    "resize_": lambda h: h.detach().clone().resize_(2, K) * h[:2],
    "resize_, larger": lambda h: h.detach().clone().resize_(B + 1, K)[:B] * h,
    "resize_as_": lambda h: h.detach().clone().resize_as_(torch.ones(2, K)) * h[:2],
    "a power": lambda h: (h.abs() + 1).pow_(h),
}


@pytest.mark.filterwarnings("ignore:The whole model runs model by model")
@pytest.mark.parametrize("name", RELAID)
def test_what_moves_in_place(name: str) -> None:
    class Relaid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(K, K).double())

        def forward(self, x: Tensor) -> Tensor:
            return RELAID[name](x @ self.w)

    models, x = [Relaid() for _ in range(M)], torch.randn(B, K).double()
    batch = ModelBatch(models)
    outputs = batch(x)
    (gradient,) = torch.autograd.grad(outputs.pow(2).sum(), list(batch.parameters()))
    for m, model in enumerate(models):
        expected = model(x)
        close(outputs[m], expected)
        close(gradient[m], *torch.autograd.grad(expected.pow(2).sum(), model.w))
