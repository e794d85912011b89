"""The ways to train M networks that a benchmark compares: those that people would use, and mbkit's own.

Each is a function of the models, a class of torch.optim, M configs for it and M seeds. It returns a `Side`, or raises
NotImplementedError where it cannot train these models or is not installed. All train copies of the models with
cross-entropy. To add one, write the function here and name it in `BASELINES`: `tests/benchmark/test_suite.py` then
compares it with plain PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..batch.model_batch import ModelBatch
from ..common.machine import synchronize, tune_malloc
from ..common.process import Worker
from ..models import MLP, LeNet5
from ..optim import OptimizerFactory
from ..training.options import StepOptions
from ..training.sequential import LoneTrainer
from ..training.step import Stepper

LOOP, LOOP_AS_IT_IS = "sequential, malloc set", "sequential"
_MANY = 1024  # models from which on modelbatch's setup and steps, a Python loop each, take minutes
_Step = Callable[[Any, Any], Any]  # inputs and targets
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
        runs: for each of `steps` the seconds of every call so far.
    """

    steps: list[_Step]
    num_models: int
    read: Callable[[int, str], Tensor]
    trained: Any = None
    draws: list[Any] = field(default_factory=list)
    stepper: Stepper | None = None

    def __post_init__(self) -> None:
        self.runs: list[list[float]] = [[] for _ in self.steps]

    def run(self, block: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make the steps of a block of batches, one run after the other; the clock waits for the device."""
        for n, (step, run) in enumerate(zip(self.steps, self.runs, strict=True)):
            with self.draws[n].current() if self.draws else contextlib.nullcontext():
                for x, y in block:
                    synchronize(y.device)
                    start = time.perf_counter()
                    step(x, y)
                    synchronize(y.device)
                    run.append(time.perf_counter() - start)

    def seconds(self) -> Tensor:
        """Return `[all steps, one or M]`, what each step took."""
        return torch.tensor(self.runs, dtype=torch.float64).T


def _sequential(models: _Models, optimizer_cls: type, configs: _Configs, seeds: Sequence[int]) -> Side:
    """Plain PyTorch, one model after the other."""
    trained, loss_fn = copy.deepcopy(list(models)), _loss_of(models)
    given = zip(trained, seeds, configs, strict=True)
    lones = [LoneTrainer(model, seed, optimizer_cls, config) for model, seed, config in given]
    steps = [lambda x, y, lone=lone: lone.update(x, y, loss_fn) for lone in lones]
    read = lambda m, name: trained[m].get_parameter(name).detach()  # noqa: E731
    return Side(steps, len(lones), read, trained, [lone.draws for lone in lones])


def _one_thread(*given: Any) -> Side:
    """The same in a process of a pool."""
    torch.set_num_threads(1)
    tune_malloc()
    return _sequential(*given)


class _Pool(Side):
    """A process for each thread, which trains its share of the models alone."""

    def __init__(self, models: _Models, optimizer_cls: type, configs: _Configs, seeds: Sequence[int]) -> None:
        count = min(len(models), torch.get_num_threads())
        self._workers = [Worker() for _ in range(count)]
        for n, worker in enumerate(self._workers):
            own = list(models)[n::count], optimizer_cls, list(configs)[n::count], list(seeds)[n::count]
            worker.send(_one_thread, *own)
        for worker in self._workers:
            worker.receive()
        read = lambda m, name: self._workers[m % count].ask("read", m // count, name)  # noqa: E731
        super().__init__([lambda x, y: None], len(models), read)

    def run(self, block: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make the steps of a block of batches in all processes; the clock stops when the last one is done."""
        start = time.perf_counter()
        for worker in self._workers:
            worker.send("run", list(block))
        for worker in self._workers:
            worker.receive()
        self.runs[0] += [(time.perf_counter() - start) / len(block)] * len(block)


def _batched(models: _Models, optimizer_cls: type, configs: _Configs, seeds: Sequence[int]) -> tuple[Any, Any, Any]:
    """Return mbkit's batch, its optimizer, and what reads a parameter."""
    batch = ModelBatch(models, seeds=seeds)
    optimizer = OptimizerFactory(optimizer_cls).create_optimizer(batch, list(configs))
    return batch, optimizer, lambda m, name: batch.stacked_params[name].detach()[m]


def _fit(*given: Any, **how: Any) -> Side:
    """mbkit, its steps as `fit` makes them; what cannot be compiled warns."""
    batch, optimizer, read = _batched(*given)
    stepper = Stepper(batch, optimizer, StepOptions(_loss_of(given[0]), **how))
    return Side([stepper.step], batch.num_models, read, batch, stepper=stepper)


def _own_loop(*given: Any) -> Side:
    """mbkit in a training loop that its user wrote."""
    batch, optimizer, read = _batched(*given)
    loss_fn = _loss_of(given[0])
    step = _update(lambda x, y: batch.compute_loss(batch(x), y, loss_fn), optimizer)
    return Side([step], batch.num_models, read, batch)


def _update(loss: _Step, optimizer: Any, *others: Any) -> _Step:
    """Return a step as users write it; the gradients of others are cleared, too."""

    def step(x: Tensor, y: Tensor) -> None:
        for each in (optimizer, *others):
            each.zero_grad()
        loss(x, y).backward()
        optimizer.step()

    return step


def _modelbatch(models: _Models, optimizer_cls: type, configs: _Configs, _: Any) -> Side:
    """The library modelbatch, with its stacked gradients cleared, as its own zero_grad() does by now."""
    _refuse([*models[0].buffers()], "it does not keep buffers such as BatchNorm's")
    _refuse(len(models) > _MANY, f"it takes minutes for more than {_MANY} models")
    _refuse(importlib.util.find_spec("modelbatch") is None, "modelbatch is not installed")
    import modelbatch

    batch = modelbatch.ModelBatch(copy.deepcopy(list(models)))
    optimizer = modelbatch.OptimizerFactory(optimizer_cls).create_optimizer(batch, list(configs))
    loss_fn = _loss_of(models)
    step = _update(lambda x, y: batch.compute_loss(batch(x), y, loss_fn), optimizer, batch)
    return Side([step], len(models), lambda m, name: batch.get_model_states()[m][name])


def _naive_vmap(models: _Models, optimizer_cls: type, configs: _Configs, _: Any) -> Side:
    """torch.func's recipe for ensembles: stacked state, vmap, one optimizer with one rate."""
    _refuse([*models[0].buffers()], "running statistics are edited in place")
    parameters, buffers = torch.func.stack_module_state(list(models))
    template, loss_fn = copy.deepcopy(models[0]), _loss_of(models)
    optimizer = optimizer_cls(list(parameters.values()), **configs[0])

    def loss(params: dict, buffers: dict, x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(torch.func.functional_call(template, (params, buffers), (x,)), y)

    losses = torch.vmap(loss, in_dims=(0, 0, None, None))
    step = _update(lambda x, y: losses(parameters, buffers, x, y).sum(), optimizer)
    return Side([step], len(models), lambda m, name: parameters[name].detach()[m])


def _loss_of(models: _Models) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss that a network's class has, or else cross entropy."""
    return getattr(models[0], "loss_fn", cross_entropy)


def _refuse(condition: Any, why: str) -> None:
    if condition:
        raise NotImplementedError(why)


def _jax(models: _Models, optimizer_cls: type, configs: _Configs, _: Any) -> Side:
    """jit(vmap(...)) of the same network, loss and Adam in JAX."""
    _refuse(optimizer_cls is not torch.optim.Adam, "only Adam is written in JAX")
    _refuse(type(models[0]) not in (MLP, LeNet5), "this network is not written in JAX")
    _refuse(next(models[0].parameters()).device.type != "cpu", "JAX is measured on CPUs only")
    _refuse(importlib.util.find_spec("jax") is None, "JAX is not installed")
    import jax
    import jax.numpy as jnp
    from jax.example_libraries.optimizers import adam

    def forward(params: dict, x: Any) -> Any:
        layers = sorted({name.rpartition(".")[0] for name in params})
        for name in layers:
            weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
            if weight.ndim == 4:
                x = jax.nn.relu(jax.lax.conv(x, weight, (1, 1), "VALID") + bias[:, None, None])
                x = jax.lax.reduce_window(x, -float("inf"), jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
            else:
                x = x.reshape(len(x), -1) @ weight.T + bias
                x = x if name == layers[-1] else jax.nn.relu(x)
        return x

    def loss(params: dict, x: Any, y: Any) -> Any:
        logs = jax.nn.log_softmax(forward(params, x))
        return -jnp.take_along_axis(logs, y[:, None], 1).mean()

    def one(state: Any, count: Any, rate: Any, x: Any, y: Any) -> Any:
        _, update, read = adam(rate)
        return update(count, jax.grad(loss)(read(state), x, y), state)

    stacked, _ = torch.func.stack_module_state(list(models))
    rates, done = jnp.asarray([config["lr"] for config in configs]), itertools.count()
    run, (init, _, read) = jax.jit(jax.vmap(one, in_axes=(0, None, 0, None, None))), adam(0.0)
    state = [jax.vmap(init)({name: jnp.asarray(p.detach().numpy()) for name, p in stacked.items()})]

    def step(x: Tensor, y: Tensor) -> None:
        state[0] = jax.block_until_ready(run(state[0], next(done), rates, x.numpy(), y.numpy().astype("int32")))

    return Side([step], len(models), lambda m, name: torch.from_numpy(np.array(read(state[0])[name][m])))


BASELINES: dict[str, Callable[..., Side]] = {
    LOOP_AS_IT_IS: _sequential,  # the one side whose process leaves malloc as it is
    LOOP: _sequential,
    "process pool": _Pool,
    "modelbatch": _modelbatch,
    "naive vmap": _naive_vmap,
    "JAX jit(vmap)": _jax,
    "mbkit": _fit,
    "mbkit, own loop": _own_loop,
    "mbkit compiled": partial(_fit, compile=True),
}
