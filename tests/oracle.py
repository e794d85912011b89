"""What all tests judge by: models trained by themselves in plain PyTorch, and the comparers.

- `train_alone(models, data, ...)` is the lone loop: no line of mbkit, one model after the other, in place;
  `trained_alone` does it with copies. Optimizer, configs, clipping, schedule, seeds and per-model data are arguments.
- `train_batch(batch, data, ...)` trains a ModelBatch as its users do, with torch's own optimizer.
- `close(got, expected, tolerance)` compares tensors; `assert_same_models(batch, models)` everything that a batch holds
  with lone models, and `assert_same_parameters(models, others)` modules with modules. Tolerances are relative to the
  largest number expected: 1e-10 is for float64, where rounding in another order is a hundred times smaller.
- `snapshot(module)` and `assert_unchanged(module, before)` tell whether a module was left as it was.
- `NETS`, `build`, `batches`: small networks that are hard to stack, and data for them; `classifiers`, `points`,
  `loader`, `batched` are those of the tests of fit and fit_alone.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mbkit.batch.model_batch import ModelBatch
from mbkit.optim import OptimizerFactory

SEEDS = [11, 7, 2**40, 0]
M = len(SEEDS)
B, STEPS, RATE = 6, 5, 0.05
MOMENTUM = {"lr": RATE, "momentum": 0.9}


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
    data: Sequence[tuple[Any, Any]],
    own: bool = False,
    loss_fn: Callable = nn.functional.mse_loss,
    max_norm: Any = None,
    seeds: Sequence[int] | None = SEEDS,
    optimizer_cls: type = torch.optim.SGD,
    configs: Any = MOMENTUM,
    schedule: Any = None,
    every: int = 1,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Train each model as if there were no other, in place, by the plainest loop; return the losses `[steps, M]`.

    Args:
        models: M modules. data: a pair of inputs and targets for each step, tensors.
        own: whether each model has its slice of inputs and targets, `[M, B, ...]`.
        max_norm, configs, schedule: one for all models or a list of M; a schedule is made from the optimizer.
        seeds: model m trains after `torch.manual_seed(seeds[m])`, and likewise for Python's and NumPy's generators.
        every: after how many steps the schedule is stepped.
        autocast: the dtype in which forward and loss run, with backward and update outside.
    """

    def each(value: Any) -> list[Any]:
        return list(value) if isinstance(value, (list, tuple)) else [value] * len(models)

    losses = torch.zeros(len(data), len(models), dtype=torch.float64)
    settings = zip(models, each(configs), each(max_norm), each(schedule), strict=True)
    for m, (model, config, norm, make) in enumerate(settings):
        if seeds is not None:
            seed_all(seeds[m])
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer_cls(trained, **config) if trained else None
        scheduler = make(optimizer) if make else None
        if not model.training:
            model.train()
        for step, (x, y) in enumerate(data):
            model.zero_grad()
            with nullcontext() if autocast is None else torch.autocast(x.device.type, autocast):
                loss = loss_fn(model(x[m] if own else x), y[m] if own else y)
            losses[step, m] = loss.detach()
            if optimizer is not None:
                loss.backward()
                if norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), norm)
                optimizer.step()
            if scheduler is not None and (step + 1) % every == 0:
                scheduler.step()
    return losses


def trained_alone(models: Sequence[nn.Module], *args: Any, **kwargs: Any) -> list[nn.Module]:
    """Return copies of the models, trained by `train_alone`."""
    models = copy.deepcopy(list(models))
    train_alone(models, *args, **kwargs)
    return models


def train_batch(
    batch: Any,
    data: Sequence[tuple[Tensor, Tensor]],
    loss_fn: Callable = nn.functional.mse_loss,
    max_norm: Sequence[float] | None = None,
) -> Tensor:
    """Train a batch as its users do, with torch's own optimizer, and return the losses `[steps, M]`."""
    optimizer = torch.optim.SGD([p for p in batch.parameters() if p.requires_grad], **MOMENTUM)
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


def assert_same_parameters(got: Sequence[nn.Module], expected: Sequence[nn.Module], tolerance: float = 1e-10) -> None:
    """Compare the parameters of M modules with those of M others; a tolerance of 0 asks for the same bits."""
    for m, (one, other) in enumerate(zip(got, expected, strict=True)):
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            close(p, q, tolerance, f"{name} of model {m}")


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10, what: str = "tensor") -> None:
    """Compare two tensors: their difference is at most `tolerance` times the largest number expected.

    Where that number is below 1 it counts as 1: what should be zero is what is left over of numbers of that size.
    """
    numbers = expected.detach().abs()
    numbers = numbers[numbers.isfinite()]
    scale = max(1.0, numbers.max().item()) if numbers.numel() else 1.0
    torch.testing.assert_close(
        got.detach(),
        expected.detach(),
        rtol=0,
        atol=tolerance * scale,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def next_draws() -> tuple[float, float, float]:
    """Return what they draw next, which tells where they stand."""
    return torch.rand(()).item(), random.random(), np.random.rand()


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


# ------------------------------------------------------------------ for the tests of fit and fit_alone

RATES = [0.1, 0.05, 0.2, 0.15]  # fewer than four models go one by one
CONFIGS = [{"lr": lr} for lr in RATES]


def classifiers(dropout: float = 0.5) -> list[nn.Module]:
    """Return M networks of 4 inputs and 3 classes."""
    return [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)) for _ in range(M)]


def points(steps: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Return a batch of B inputs and labels for each step."""
    return [(torch.randn(B, 4), torch.randint(3, (B,))) for _ in range(steps)]


def loader(**kwargs: Any) -> DataLoader:
    """Return a shuffling loader of 22 examples, whose last batch is smaller."""
    data = TensorDataset(torch.randn(22, 4), torch.randint(3, (22,)))
    return DataLoader(data, batch_size=B, **({"shuffle": True} | kwargs))


def batched(models: Sequence[nn.Module], optimizer_cls: type = torch.optim.SGD, **kwargs: Any) -> tuple[Any, Any]:
    """Return a batch of the models and its optimizer with `CONFIGS`."""
    batch = ModelBatch(models, seeds=SEEDS, **kwargs)
    return batch, OptimizerFactory(optimizer_cls).create_optimizer(batch, CONFIGS)


class Identity(torch.autograd.Function):
    """Returns a copy; subclasses say what its backward pass does."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass
