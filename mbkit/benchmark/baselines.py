"""What a benchmark compares: networks, and the ways to train M of them: one by one, mbkit's own, and others'.

Each way is a function `rival(models, optimizer_cls, rates)` that returns a `step(x, y)` which makes one update of its
models, and the number of models that it updates; or None, where it cannot train them. All train with cross-entropy, in
place of the given models or on copies, with a learning rate a model. `step.read(m, name)` gives a parameter, except for
the sequential side.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..batch.model_batch import ModelBatch
from ..models import GPT, MLP, LeNet5, LSTMClassifier, ResNet
from ..optim import OptimizerFactory
from ..training.sequential import lone_step
from ..training.step import Stepper

__all__ = ["NETWORKS", "OWN", "RIVALS", "Case", "Rival"]

Rival = Callable[[Sequence[nn.Module], type, Sequence[float]], tuple[Callable[[Any, Any], Any], int] | None]
_MANY = 1024  # models from which on modelbatch's setup and steps, a Python loop each, take minutes
_LONE = 8  # models that the sequential side trains in turn: all M would only take longer


@dataclass(frozen=True)
class Case:
    """One row of the suite.

    Args:
        network: the class's name. num_models: M. batch_size: B.
    """

    network: str
    num_models: int
    batch_size: int

    def models(self) -> list[nn.Module]:
        """Return M models from seeds 0, 1, 2, …"""
        build, _ = NETWORKS[self.network]
        found = []
        with torch.random.fork_rng(devices=[]):
            for m in range(self.num_models):
                torch.manual_seed(m)
                found.append(build())
        return found

    def data(self) -> tuple[Tensor, Tensor]:
        """Return one random batch, the same for all sides."""
        _, example = NETWORKS[self.network]
        generator = torch.Generator().manual_seed(0)
        x = example(self.batch_size, generator)
        return x, torch.randint(4, (self.batch_size,), generator=generator)


def _images(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=generator)


def _tokens(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(64, (count, 32), generator=generator)


# The network's name -> what makes one, and what makes a batch of B inputs.
NETWORKS = {
    "MLP": (lambda: MLP((20, 16, 16, 4)), lambda count, g: torch.randn(count, 20, generator=g)),
    "LeNet5": (LeNet5, _images),
    "ResNet": (ResNet, _images),
    "GPT": (GPT, _tokens),
    "LSTM": (LSTMClassifier, lambda count, g: torch.randn(count, 32, 16, generator=g)),
}


def _sequential(models: Sequence[nn.Module], optimizer_cls: type, rates: Sequence[float]):
    """Plain PyTorch, one model after the other."""
    models = copy.deepcopy(list(models[:_LONE]))
    optimizers = [optimizer_cls(m.parameters(), lr=rate) for m, rate in zip(models, rates, strict=False)]

    def step(x: Tensor, y: Tensor) -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            lone_step(model, optimizer, x, y, cross_entropy)

    return step, len(models)


def _own(models: Sequence[nn.Module], optimizer_cls: type, rates: Sequence[float], **how: Any):
    batch = ModelBatch(models, seeds=range(len(models)))
    optimizer = OptimizerFactory(optimizer_cls).create_optimizer(batch, lr=list(rates))
    stepper = Stepper(batch, optimizer, cross_entropy, **how)

    def step(x: Tensor, y: Tensor) -> None:
        stepper.step(x, y)

    step.stepper = stepper
    step.read = lambda m, name: batch.stacked_params[name].detach()[m]
    return step, len(models)


def _compiled(models: Sequence[nn.Module], optimizer_cls: type, rates: Sequence[float]):
    """mbkit with compile=True."""
    step, count = _own(models, optimizer_cls, rates, compile=True)

    def compiled(x: Tensor, y: Tensor) -> None:
        step(x, y)
        if step.stepper.how != "compiled":
            raise RuntimeError("not compiled")

    return compiled, count


def _modelbatch(models: Sequence[nn.Module], optimizer_cls: type, rates: Sequence[float]):
    """The library modelbatch, with its stacked gradients cleared, as its own zero_grad() does by now."""
    if importlib.util.find_spec("modelbatch") is None or any(True for _ in models[0].buffers()):
        return None
    if len(models) > _MANY:
        return None
    import modelbatch

    batch = modelbatch.ModelBatch(copy.deepcopy(list(models)))
    configs = [{"lr": rate} for rate in rates]
    optimizer = modelbatch.OptimizerFactory(optimizer_cls).create_optimizer(batch, configs)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        batch.zero_grad()
        batch.compute_loss(batch(x), y, cross_entropy).backward()
        optimizer.step()

    step.read = lambda m, name: batch.get_model_states()[m][name]
    return step, len(models)


def _naive_vmap(models: Sequence[nn.Module], optimizer_cls: type, rates: Sequence[float]):
    """torch.func's recipe for ensembles: stacked state, vmap, one optimizer with one rate, BatchNorm kept in eval."""
    parameters, buffers = torch.func.stack_module_state(list(models))
    template = copy.deepcopy(models[0])
    if any(True for _ in models[0].buffers()):
        return None  # running statistics are edited in place, which the recipe cannot do
    optimizer = optimizer_cls(list(parameters.values()), lr=rates[0])

    def loss(params: dict, buffers: dict, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(template, (params, buffers), (x,)), y)

    losses = torch.vmap(loss, in_dims=(0, 0, None, None))

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        losses(parameters, buffers, x, y).sum().backward()
        optimizer.step()

    step.read = lambda m, name: parameters[name].detach()[m]
    return step, len(models)


def _jax(models: Sequence[nn.Module], optimizer_cls: type, rates: Sequence[float]):
    """jit(vmap(...)) of the same network, loss and Adam, written in JAX; for the networks that are written here."""
    forward = {MLP: _jax_mlp, LeNet5: _jax_lenet}.get(type(models[0]))
    if forward is None or optimizer_cls is not torch.optim.Adam or importlib.util.find_spec("jax") is None:
        return None
    import jax
    import jax.numpy as jnp

    stacked, _ = torch.func.stack_module_state(list(models))
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in stacked.items()}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = [params, zeros, zeros, jnp.zeros(len(models))]
    rate = jnp.asarray(list(rates))

    def loss(params: dict, x: Any, y: Any) -> Any:
        logs = jax.nn.log_softmax(forward(params, x))
        return -jnp.take_along_axis(logs, y[:, None], 1).mean()

    def one(params: dict, first: dict, second: dict, count: Any, rate: Any, x: Any, y: Any) -> tuple:
        grads, count = jax.grad(loss)(params, x, y), count + 1
        first = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * g, first, grads)
        second = jax.tree.map(lambda a, g: 0.999 * a + 0.001 * g * g, second, grads)

        def update(p: Any, a: Any, b: Any) -> Any:
            return p - rate * (a / (1 - 0.9**count)) / (jnp.sqrt(b / (1 - 0.999**count)) + 1e-8)

        return jax.tree.map(update, params, first, second), first, second, count

    run = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, 0, None, None)))

    def step(x: Tensor, y: Tensor) -> None:
        state[:] = jax.block_until_ready(run(*state, rate, x.numpy(), y.numpy().astype("int32")))

    step.read = lambda m, name: torch.from_numpy(np.array(state[0][name][m]))
    return step, len(models)


def _jax_mlp(params: dict, x: Any) -> Any:
    import jax

    count = len(params) // 2
    for i in range(count):
        x = x @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"]
        x = jax.nn.relu(x) if i < count - 1 else x
    return x


def _jax_lenet(params: dict, x: Any) -> Any:
    import jax

    for name in ("conv1", "conv2"):
        x = jax.lax.conv(x, params[f"{name}.weight"], (1, 1), "VALID") + params[f"{name}.bias"][:, None, None]
        x = jax.lax.reduce_window(jax.nn.relu(x), -float("inf"), jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    x = x.reshape(len(x), -1)
    for name in ("fc1", "fc2", "fc3"):
        x = x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
        x = jax.nn.relu(x) if name != "fc3" else x
    return x


RIVALS: dict[str, Rival] = {
    "sequential": _sequential,
    "mbkit": _own,
    "mbkit compiled": _compiled,
    "modelbatch": _modelbatch,
    "naive vmap": _naive_vmap,
    "JAX jit(vmap)": _jax,
}
OWN = ("mbkit", "mbkit compiled")
