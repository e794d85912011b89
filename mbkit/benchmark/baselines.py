"""The ways to train M networks that a benchmark compares: one after the other, mbkit's own, and other libraries'.

Each is a function of the models, a class of torch.optim, M configs for it and M seeds. It returns a `Side`, or None
where it cannot train these models or is not installed. All train copies of the models with cross-entropy. To add one,
write the function here and name it in `BASELINES`: `tests/benchmark/test_suite.py` then compares it with plain PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..batch.model_batch import ModelBatch
from ..common.machine import synchronize
from ..models import MLP, LeNet5
from ..optim import OptimizerFactory
from ..training.options import StepOptions
from ..training.sequential import LoneTrainer
from ..training.step import Stepper

__all__ = ["BASELINES", "OWN", "Side"]

_MANY = 1024  # models from which on modelbatch's setup and steps, a Python loop each, take minutes
_Step = Callable[[Any, Any], Any]  # inputs and targets; returns the losses where there are any to be kept
_Models, _Configs = Sequence[nn.Module], Sequence[dict[str, Any]]


@dataclass
class Side:
    """One way to train, ready for its steps, which it clocks.

    Args:
        steps: what takes turns; each makes an update of one model, or of all.
        num_models: that all of them train together.
        read: a parameter, from a model's number and the parameter's name.
        trained: the models, or the batch of them.
        draws: for each of `steps` the random state that it has to itself, if any.
        stepper: of mbkit's own.

    Attributes:
        runs: for each of `steps` the loss and the seconds of every step so far.
    """

    steps: list[_Step]
    num_models: int
    read: Callable[[int, str], Tensor]
    trained: Any = None
    draws: list[Any] = field(default_factory=list)
    stepper: Stepper | None = None

    def __post_init__(self) -> None:
        self.runs: list[list[tuple[Any, float]]] = [[] for _ in self.steps]

    def run(self, block: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make the steps of a block of batches, one run after the other; the clock waits for the device."""
        for n, (step, run) in enumerate(zip(self.steps, self.runs, strict=True)):
            with self.draws[n].current() if self.draws else contextlib.nullcontext():
                for x, y in block:
                    synchronize(y.device)
                    start = time.perf_counter()
                    loss = step(x, y)
                    synchronize(y.device)
                    run.append((loss, time.perf_counter() - start))

    def seconds(self) -> Tensor:
        """Return `[all steps, one or M]`, what each step took."""
        return torch.tensor([[seconds for _, seconds in run] for run in self.runs], dtype=torch.float64).T

    def loss(self) -> Tensor:
        """Return `[all steps, M]`, the losses before each update."""
        return torch.cat([torch.stack([loss.view(-1) for loss, _ in run]) for run in self.runs], 1).cpu()


def _sequential(
    models: Sequence[nn.Module], optimizer_cls: type, configs: Sequence[dict], seeds: Sequence[int]
) -> Side:
    """Plain PyTorch, one model after the other."""
    trained = copy.deepcopy(list(models))
    given = zip(trained, seeds, configs, strict=True)
    lones = [LoneTrainer(model, seed, optimizer_cls, config) for model, seed, config in given]
    steps = [lambda x, y, lone=lone: lone.update(x, y, cross_entropy)[0] for lone in lones]

    def read(m: int, name: str) -> Tensor:
        return trained[m].get_parameter(name).detach()

    return Side(steps, len(lones), read, trained, [lone.draws for lone in lones])


def _own(models: _Models, optimizer_cls: type, configs: _Configs, seeds: Sequence[int], **how: Any) -> Side:
    """mbkit, its steps as `fit` makes them."""
    batch = ModelBatch(models, seeds=seeds)
    optimizer = OptimizerFactory(optimizer_cls).create_optimizer(batch, list(configs))
    stepper = Stepper(batch, optimizer, StepOptions(cross_entropy, **how))
    read = lambda m, name: batch.stacked_params[name].detach()[m]  # noqa: E731
    return Side([lambda x, y: stepper.step(x, y)[0]], len(models), read, batch, stepper=stepper)


def _compiled(*given: Any) -> Side:
    """mbkit with compile=True."""
    side = _own(*given, compile=True)
    [step] = side.steps

    def compiled(x: Tensor, y: Tensor) -> Tensor:
        losses = step(x, y)
        if side.stepper.how != "compiled":
            raise RuntimeError("not compiled")
        return losses

    side.steps = [compiled]
    return side


def _modelbatch(models: _Models, optimizer_cls: type, configs: _Configs, _: Any) -> Side | None:
    """The library modelbatch, with its stacked gradients cleared, as its own zero_grad() does by now."""
    if importlib.util.find_spec("modelbatch") is None or _has_buffers(models) or len(models) > _MANY:
        return None
    import modelbatch

    batch = modelbatch.ModelBatch(copy.deepcopy(list(models)))
    optimizer = modelbatch.OptimizerFactory(optimizer_cls).create_optimizer(batch, list(configs))

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        batch.zero_grad()
        batch.compute_loss(batch(x), y, cross_entropy).backward()
        optimizer.step()

    return Side([step], len(models), lambda m, name: batch.get_model_states()[m][name])


def _naive_vmap(models: _Models, optimizer_cls: type, configs: _Configs, _: Any) -> Side | None:
    """torch.func's recipe for ensembles: stacked state, vmap, one optimizer with one rate."""
    if _has_buffers(models):
        return None  # running statistics are edited in place, which the recipe cannot do
    parameters, buffers = torch.func.stack_module_state(list(models))
    template = copy.deepcopy(models[0])
    optimizer = optimizer_cls(list(parameters.values()), **configs[0])

    def loss(params: dict, buffers: dict, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(template, (params, buffers), (x,)), y)

    losses = torch.vmap(loss, in_dims=(0, 0, None, None))

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        losses(parameters, buffers, x, y).sum().backward()
        optimizer.step()

    return Side([step], len(models), lambda m, name: parameters[name].detach()[m])


def _has_buffers(models: _Models) -> bool:
    return any(True for _ in models[0].buffers())


def _jax(models: _Models, optimizer_cls: type, configs: _Configs, _: Any) -> Side | None:
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
    rates = jnp.asarray([config["lr"] for config in configs])

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
        state[:] = jax.block_until_ready(run(*state, rates, x.numpy(), y.numpy().astype("int32")))

    return Side([step], len(models), lambda m, name: torch.from_numpy(np.array(state[0][name][m])))


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


BASELINES: dict[str, Callable[..., Side | None]] = {
    "sequential": _sequential,
    "mbkit": _own,
    "mbkit compiled": _compiled,
    "modelbatch": _modelbatch,
    "naive vmap": _naive_vmap,
    "JAX jit(vmap)": _jax,
}
OWN = ("mbkit", "mbkit compiled")
