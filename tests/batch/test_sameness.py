"""Models that only look different are taken, with what they share, and with hooks that keep what they see or do not."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from contextvars import ContextVar

import pytest
import torch
from oracle import SEEDS, Config, Holds, assert_same_parameters, hooked, local, local_lambda, train_alone
from torch import Tensor, nn
from torch.nn import functional as F

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.batch.context import context_of
from mbkit.vmap import BatchingError

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ models that only look different
ALIKE: dict[str, Callable[[], nn.Module]] = {
    "a class made twice": lambda: local(0.1),
    "lambdas of one kind": lambda: local_lambda(2.0),
    "partials": lambda: Holds(act=functools.partial(F.leaky_relu, negative_slope=0.1)),
    "objects of one kind": lambda: Holds(cfg=Config(3)),
    "arrays": lambda: Holds(a=torch.ones(2).numpy()),
    "not a number": lambda: Holds(gap=float("nan")),
    "a list of its own layers": lambda: with_own_layers(),
    "a bound method": lambda: with_own_method(),
    "a child that knows its parent": lambda: with_parent(),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "parametrized below": lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))),
    "hooks of one kind": lambda: hooked(2),
    "a cell not filled yet": lambda: with_empty_cell(),
}


def with_own_layers() -> nn.Module:
    net = Holds()
    net.again, net.weights = [net.fc], {"w": net.fc.weight}
    return net


def with_own_method() -> nn.Module:
    net = Holds()
    net.call = net.forward
    return net


def with_parent() -> nn.Module:
    net = Holds()
    net.fc.owner = [net]
    return net


def with_empty_cell() -> nn.Module:
    def early() -> int:
        return later

    net = Holds(early=early)
    if net is None:
        later = 1
    return net


@pytest.mark.parametrize("case", ALIKE)
def test_what_means_the_same_is_taken(case: str) -> None:
    models = [ALIKE[case]() for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that vmap leaves to a loop
        got = ModelBatch(models)(X)
    for m, model in enumerate(models):
        torch.testing.assert_close(got[m], model(X))


@pytest.mark.parametrize("first", [0, 0.5, 1])
def test_a_rate_may_be_written_as_a_whole_number(first: float) -> None:
    models = [nn.Sequential(nn.Linear(3, 8), nn.Dropout(p)) for p in (first, 0.25)]
    batch = ModelBatch(models, seeds=[1, 2])
    got = batch(X)
    for m, model in enumerate(models):
        torch.manual_seed(m + 1)
        torch.testing.assert_close(got[m], model(X))
    assert [batch[m][1].p for m in range(2)] == [first, 0.25]


class Reads(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(3, 2), table

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.table


def test_a_table_that_all_models_share_stays_one() -> None:
    table = torch.randn(2)
    models = [Reads(table) for _ in range(3)]
    batch = ModelBatch(models)
    assert context_of(batch).template.table.shape == (2,)
    got = batch(X)
    for m, model in enumerate(models):
        torch.testing.assert_close(got[m], model(X))


# ------------------------------------------------------------------ forward hooks
class Recorder:
    def __init__(self) -> None:
        self.seen = []

    def __call__(self, module, inputs, output=None):
        self.seen.append(output if output is not None else inputs[0])

    def method(self, *args):
        self(*args)


KEPT: list[Tensor] = []


def into_a_global(module, inputs, output):
    KEPT.append(output)


@pytest.mark.parametrize("way", ["closure", "object", "method", "pre", "global", "default"])
def test_hooks_that_keep_what_they_see(way):
    recorder = Recorder()
    seen = KEPT if way == "global" else recorder.seen
    seen.clear()
    hook = {
        "closure": lambda module, inputs, output: seen.append(output),
        "object": recorder,
        "method": recorder.method,
        "pre": recorder,
        "global": into_a_global,
        "default": lambda module, inputs, output, kept=seen: kept.append(output),
    }[way]
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(3)]
    for model in models:
        model[1].register_forward_pre_hook(hook) if way == "pre" else model[1].register_forward_hook(hook)
    batch = ModelBatch(models)
    with pytest.warns(
        UserWarning, match=r"'1' \(Linear\) runs model by model: .*its hooks are to see each model's own"
    ):
        batch(X)
    batch(X)
    got = list(seen)
    seen.clear()
    for model in models:
        model(X)
    assert len(got) == 6
    for m, expected in enumerate(seen):
        assert torch.allclose(got[m], expected, atol=1e-6)
        assert torch.allclose(got[3 + m], expected, atol=1e-6)


def test_hooks_that_keep_nothing_stay_fast():
    models = [nn.Linear(3, 2) for _ in range(2)]
    for model in models:
        model.register_forward_hook(lambda module, inputs, output: 2 * output)
    batch = ModelBatch(models)
    assert torch.allclose(batch(X)[1], models[1](X), atol=1e-6)
    assert batch.model_by_model == set()


# ------------------------------------------------------------------ hooks that a call registers
COLLECTOR: ContextVar[list | None] = ContextVar("collector", default=None)


def collecting(index: int) -> Callable:
    def hook(module, inputs, output):
        if COLLECTOR.get() is not None:
            COLLECTOR.get().append(output[..., :index])

    return hook


class Capturing(nn.Module):
    """Registers hooks in its first call, by which it returns what its layers have made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not getattr(self, "_has_hooks", False):
            for layer in self.layers:
                layer.register_forward_hook(collecting(2))
            self._has_hooks = True
        token = COLLECTOR.set([])
        try:
            return self.layers(x), *COLLECTOR.get()
        finally:
            COLLECTOR.reset(token)


def all_of_them(outputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return sum((out - y).square().mean() for out in outputs)


@pytest.mark.parametrize("chunk_size", [None, 2, 1])
def test_hooks_that_a_call_registers_stay_and_there_is_one_of_each(chunk_size: int | None) -> None:
    models = [Capturing() for _ in range(4)]
    data = [(torch.randn(5, 3).double(), torch.randn(5, 2).double()) for _ in range(3)]
    batch = ModelBatch(copy.deepcopy(models), seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    fit(batch, optimizer, data, all_of_them, chunk_size=chunk_size, progress=False)
    train_alone(models, data, loss_fn=all_of_them, configs={"lr": 0.1})
    assert_same_parameters(list(batch), models, 1e-11)
    assert [len(outputs) for outputs in (batch(data[0][0]), batch[1](data[0][0]), models[1](data[0][0]))] == [4, 4, 4]


def test_hooks_that_hold_on_to_one_model_cannot_serve_all() -> None:
    class Holding(Capturing):
        def forward(self, x: Tensor) -> Tensor:
            self.layers[0].register_forward_hook(lambda *_: self.train() and None)
            return self.layers(x)

    with pytest.raises(BatchingError, match="registers a hook of its own for each model"):
        ModelBatch([Holding() for _ in range(2)], model_by_model=[""])(X.double())
