"""JAX's way to train M networks, which a benchmark compares: jit(vmap(...)) of a whole step."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models import MLP, LeNet5


def make_step(
    models: Sequence[nn.Module], configs: Sequence[dict[str, Any]]
) -> tuple[Callable[[Tensor, Tensor], None], Callable[[int, str], Tensor]]:
    """Return a step of all models with Adam and cross-entropy, and what reads a parameter.

    Raises:
        NotImplementedError: a network that is not written in JAX here, another device than a CPU, or JAX is missing.
    """
    forward = {MLP: _mlp, LeNet5: _lenet}.get(type(models[0]))
    if forward is None:
        raise NotImplementedError("this network is not written in JAX")
    if next(models[0].parameters()).device.type != "cpu":
        raise NotImplementedError("JAX is measured on CPUs only")
    if importlib.util.find_spec("jax") is None:
        raise NotImplementedError("JAX is not installed")
    import jax
    import jax.numpy as jnp
    from jax.example_libraries.optimizers import adam

    stacked, _ = torch.func.stack_module_state(list(models))
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in stacked.items()}
    rates, done = jnp.asarray([config["lr"] for config in configs]), itertools.count()

    def loss(params: dict, x: Any, y: Any) -> Any:
        logs = jax.nn.log_softmax(forward(params, x))
        return -jnp.take_along_axis(logs, y[:, None], 1).mean()

    def one(state: Any, count: Any, rate: Any, x: Any, y: Any) -> Any:
        _, update, read = adam(rate)
        return update(count, jax.grad(loss)(read(state), x, y), state)

    run = jax.jit(jax.vmap(one, in_axes=(0, None, 0, None, None)))
    init, _, read = adam(0.0)
    state = [jax.vmap(init)(params)]

    def step(x: Tensor, y: Tensor) -> None:
        state[0] = jax.block_until_ready(run(state[0], next(done), rates, x.numpy(), y.numpy().astype("int32")))

    return step, lambda m, name: torch.from_numpy(np.array(read(state[0])[name][m]))


def _mlp(params: dict, x: Any) -> Any:
    return _dense(params, [f"layers.{i}" for i in range(len(params) // 2)], x)


def _lenet(params: dict, x: Any) -> Any:
    import jax

    for name in ("conv1", "conv2"):
        x = jax.lax.conv(x, params[f"{name}.weight"], (1, 1), "VALID") + params[f"{name}.bias"][:, None, None]
        x = jax.lax.reduce_window(jax.nn.relu(x), -float("inf"), jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return _dense(params, ["fc1", "fc2", "fc3"], x.reshape(len(x), -1))


def _dense(params: dict, names: Sequence[str], x: Any) -> Any:
    import jax

    for name in names:
        x = x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
        x = jax.nn.relu(x) if name != names[-1] else x
    return x
