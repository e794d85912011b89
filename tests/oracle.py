"""The reference of the ModelBatch tests: M models, each trained by itself in plain PyTorch, and networks to try."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SEEDS = [11, 7, 2**40, 0]
M = len(SEEDS)
B, STEPS, RATE = 6, 5, 0.05


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).tanh()))


class Taken(nn.Module):
    """A module that has used up every name that ModelBatch uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.Linear(3, 4)
        self.seeds, self.streams, self.settings = nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 4)
        self.template = self._context = nn.BatchNorm1d(4)
        self.num_models, self.folding = nn.Linear(4, 2), nn.Identity()
        self.register_buffer("latest_losses", torch.full((2,), 0.25))
        self.shared_input = nn.Parameter(torch.ones(2))
        self.model_by_model = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.template(self.settings(self.streams(self.seeds(self.models(x)))))
        self.latest_losses += 1
        return self.num_models(self.folding(h)) * self.shared_input + self.latest_losses


class OneNumber(nn.Module):
    """Parameters without a dimension and without an element."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.nothing = nn.Parameter(torch.randn(())), nn.Parameter(torch.zeros(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] * self.scale + self.nothing.sum()


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


class Holds(nn.Module):
    """A layer, and plain attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Config:
    def __init__(self, size: int) -> None:
        self.size = size


def hooked(count: int) -> nn.Module:
    net = nn.Linear(3, 2)
    for _ in range(count):
        net.register_forward_hook(lambda module, inputs, output: output)
    return net


def local(slope: float) -> nn.Module:
    """A class made inside a function, one a call, under one name."""

    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.leaky_relu(self.fc(x), slope)

    return Local()


def local_lambda(scale: float) -> nn.Module:
    return Holds(act=lambda x: x * scale)


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)),
    "batchnorm": lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
    "tied": Tied,
    "frozen": frozen,
    "taken names": Taken,
    "one number": OneNumber,
}


def build(name: str, count: int = M, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """Return `count` differently initialised networks."""
    return [NETS[name]().to(dtype) for _ in range(count)]


def batches(own: bool, count: int = M, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Return inputs `[B, 3]` and targets `[B, 2]` for each step, with a leading M if each model has its own."""
    lead = (count,) if own else ()
    kind = {"dtype": torch.float64}
    return [(torch.randn(*lead, B, 3, **kind), torch.randn(*lead, B, 2, **kind)) for _ in range(steps)]


def train_alone(
    models: Sequence[nn.Module],
    data: Sequence[tuple[Tensor, Tensor]],
    own: bool,
    loss_fn: Callable = nn.functional.mse_loss,
    max_norm: Sequence[float] | None = None,
    seeds: Sequence[int] | None = SEEDS,
) -> Tensor:
    """Train each model as if there were no other, in place, and return the losses `[steps, M]`."""
    losses = torch.zeros(len(data), len(models), dtype=torch.float64)
    for m, model in enumerate(models):
        if seeds is not None:
            torch.manual_seed(seeds[m])
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=RATE, momentum=0.9) if trained else None
        for step, (x, y) in enumerate(data):
            model.zero_grad()
            loss = loss_fn(model(x[m] if own else x), y[m] if own else y)
            losses[step, m] = loss.detach()
            if optimizer is not None:
                loss.backward()
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm[m])
                optimizer.step()
    return losses


def train_batch(
    batch: Any,
    data: Sequence[tuple[Tensor, Tensor]],
    loss_fn: Callable = nn.functional.mse_loss,
    max_norm: Sequence[float] | None = None,
) -> Tensor:
    """Train a batch as its users do, with torch's own optimizer, and return the losses `[steps, M]`."""
    optimizer = torch.optim.SGD([p for p in batch.parameters() if p.requires_grad], lr=RATE, momentum=0.9)
    losses = []
    for x, y in data:
        batch.zero_grad()
        each = batch.compute_loss(batch(x), y, loss_fn, reduction="none")
        each.sum().backward()
        if max_norm is not None:
            batch.clip_grad_norm_(max_norm)
        optimizer.step()
        losses.append(each.detach())
    return torch.stack(losses)


def assert_same_models(batch: Any, models: Sequence[nn.Module], tolerance: float = 1e-10) -> None:
    """Compare every parameter, its gradient and every buffer of the batch with those of the lone models."""
    for m, model in enumerate(models):
        for name, expected in model.named_parameters():
            stacked = batch.stacked_params[name]
            close(stacked[m], expected, tolerance, f"{name} of model {m}")
            assert (stacked.grad is None) == (expected.grad is None), f"gradient of {name}"
            if expected.grad is not None:
                close(stacked.grad[m], expected.grad, tolerance, f"gradient of {name} of model {m}")
        for name, expected in model.named_buffers():
            close(batch.stacked_buffers[name][m], expected, tolerance, f"{name} of model {m}")


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10, what: str = "tensor") -> None:
    torch.testing.assert_close(
        got.detach(), expected.detach(), rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Return copies of all tensors and gradients, the modes, and the identity of every hook."""
    tensors = {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}
    grads = {name: copy.deepcopy(p.grad) for name, p in module.named_parameters()}
    plain = {
        f"{path}.{name}": (list(map(id, value.values())) if name.endswith("_hooks") else repr(value))
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if name not in ("_parameters", "_buffers", "_modules")
    }
    return {"tensors": tensors, "grads": grads, "plain": plain}


def assert_unchanged(module: nn.Module, before: dict[str, Any]) -> None:
    """Compare a module with its `snapshot`, bit for bit."""
    now = snapshot(module)
    assert now["plain"] == before["plain"]
    for kind in ("tensors", "grads"):
        assert now[kind].keys() == before[kind].keys()
        for name, value in before[kind].items():
            assert now[kind][name] is value or torch.equal(now[kind][name], value), f"{kind}: {name}"
