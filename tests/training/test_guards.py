"""What a compiled step's forward and loss read in Python is what they would read alone, at every step."""

from __future__ import annotations

import functools
import itertools
import random
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.training.compiled import CompiledStep
from mbkit.training.options import StepOptions
from tests.oracle import train_alone

M, B = 4, 6
RATES = [0.01 * (m + 1) for m in range(M)]

FACTOR: Any = 1.0


class Settings:
    factor = 1.0
    nested = types.SimpleNamespace(inner=types.SimpleNamespace(factor=1.0))


@dataclass(slots=True)
class Slotted:
    factor: float = 1.0


TABLES = {value: torch.tensor(value) for value in (1.0, 2.0, 3.0)}


READ = types.SimpleNamespace(  # where a test's values stand
    slotted=Slotted(),
    listed=[[1.0]],
    held={"factor": 1.0},
    names={"a", "b"},
    table=torch.ones(()),
    array=np.ones(2),
    function=lambda: 1.0,
)


def helper() -> Any:
    return FACTOR


def deep_helper() -> Any:
    return max(helper() for _ in range(1))


class Criterion:
    """An object with a setting that its class has, too."""

    factor = 1.0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.weighed(mse_loss(outputs, targets))

    def weighed(self, loss: Tensor) -> Tensor:
        return loss * self.factor


class CriterionModule(nn.Module):
    """A module without tensors, with a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.factor = 1.0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs, targets) * self.inner.factor


class Net(nn.Module):
    """A linear layer whose output is scaled by what `read` returns."""

    scale = 1.0

    def __init__(self, read: Any = None) -> None:
        super().__init__()
        self.layer, self.read, self.factor = nn.Linear(3, 2), read, 1.0
        self.options = {"inner": Slotted()}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (self.scale if self.read is None else self.read())

    @property
    def shown(self) -> float:
        return self.scale


class OfProperty(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.shown * getattr(self, "options")["inner"].factor  # noqa: B009


def set_global(value: Any) -> None:
    global FACTOR
    FACTOR = value


def weighted(loss_fn: Any, get: Any) -> Any:
    return lambda outputs, targets: loss_fn(outputs, targets) * get()


def closed_over() -> tuple[Any, Any]:
    factor = 1.0

    def put(value: float) -> None:
        nonlocal factor
        factor = value

    return (lambda outputs, targets: factor * mse_loss(outputs, targets)), put


def defaulted(outputs: Tensor, targets: Tensor, factor: float = 1.0) -> Tensor:
    return factor * mse_loss(outputs, targets)


def of_read(get: Any, put: Any) -> Any:
    """Return what makes models that read a value in their forward, their loss, and what sets it."""
    return lambda: (lambda: Net(get), mse_loss, put)


def of_loss(loss_fn: Any, put: Any) -> Any:
    return lambda: (Net, loss_fn, put)


def object_held() -> Any:
    criterion = Criterion()
    return Net, criterion, lambda value: setattr(criterion, "factor", value)


def module_held() -> Any:
    criterion = CriterionModule()
    return Net, criterion, lambda value: setattr(criterion.inner, "factor", value)


def method_held() -> Any:
    criterion = Criterion()
    return Net, functools.partial(criterion.__call__), lambda value: setattr(criterion, "factor", value)


def closure_held() -> Any:
    loss_fn, put = closed_over()
    return Net, loss_fn, put


def keyword_held() -> Any:
    loss_fn = functools.partial(defaulted, factor=1.0)
    return Net, loss_fn, lambda value: loss_fn.keywords.update(factor=value)


def put_names(value: float) -> None:
    READ.names.clear()
    READ.names.update(map(str, range(int(value))))


READS = {
    "a global": of_read(lambda: FACTOR, set_global),
    "a global of a helper's helper": of_read(deep_helper, set_global),
    "a class attribute": of_read(lambda: Settings.factor, lambda v: setattr(Settings, "factor", v)),
    "an attribute of an attribute": of_read(
        lambda: Settings.nested.inner.factor, lambda v: setattr(Settings.nested.inner, "factor", v)
    ),
    "a slot": of_read(lambda: READ.slotted.factor, lambda v: setattr(READ.slotted, "factor", v)),
    "a new object": of_read(lambda: READ.slotted.factor, lambda v: setattr(READ, "slotted", Slotted(v))),
    "an item": of_read(lambda: READ.listed[0][0], lambda v: READ.listed[0].__setitem__(0, v)),
    "a dict's item": of_read(lambda: READ.held["factor"], lambda v: READ.held.__setitem__("factor", v)),
    "a set": of_read(lambda: len(READ.names), put_names),
    "a tensor, edited": of_read(lambda: READ.table, lambda v: v == READ.table or READ.table.fill_(v)),
    "another tensor": of_read(lambda: READ.table, lambda v: setattr(READ, "table", TABLES[v])),
    "an array": of_read(lambda: float(READ.array.sum()), lambda v: READ.array.fill(v)),
    "another function": of_read(lambda: READ.function(), lambda v: setattr(READ, "function", lambda: v)),
    "the module's class": lambda: (Net, mse_loss, lambda v: setattr(Net, "scale", v)),
    "a property": lambda: (OfProperty, mse_loss, lambda v: setattr(Net, "scale", v)),
    "a default": of_loss(defaulted, lambda v: setattr(defaulted, "__defaults__", (v,))),
    "the loss's object": object_held,
    "the loss's module": module_held,
    "a bound method's object": method_held,
    "a closure": closure_held,
    "a partial's keyword": keyword_held,
}


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    double = {"generator": generator, "dtype": torch.float64}
    return [(torch.randn(B, 3, **double), torch.randn(B, 2, **double)) for _ in range(steps)]


def train(build: Any, loss_fn: Any, put: Any, values: list) -> tuple[Any, list[str], list[nn.Module], Tensor]:
    """Train a batch compiled, with another value before each step; return its lone models and their losses, too."""
    torch.manual_seed(0)
    models, data = [build().double() for _ in range(M)], batches(len(values))
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATES)
    put(values[0])
    left = iter([*values[1:], values[-1]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(
            batch, optimizer, data, loss_fn, compile=True, chunk_size=None, progress=False,
            callback=lambda step: put(next(left)),
        )  # fmt: skip
    losses = torch.zeros(len(values), M, dtype=torch.float64)
    for m, model in enumerate(models):
        lone = torch.optim.SGD(model.parameters(), lr=RATES[m])
        for i, ((x, y), value) in enumerate(zip(data, values, strict=True)):
            put(value)
            lone.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            lone.step()
            losses[i, m] = loss.detach()
        for mine, expected in zip(batch[m].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)  # sums in another order, in float64
    torch.testing.assert_close(history.loss, losses, rtol=1e-9, atol=1e-12)
    put(1.0)
    return history, [str(w.message) for w in caught if "compile=True" in str(w.message)], models, losses


@pytest.mark.parametrize("read", READS)
def test_a_value_that_changes_is_read_anew_and_compiled_once(graphs, read):
    history, said, *_ = train(*READS[read](), [1.0, 1.0, 2.0, 2.0, 1.0, 3.0])
    assert (history.how, said) == ("compiled", [])
    assert len(graphs) == (4 if read == "a tensor, edited" else 3)  # its numbers are not compared


@pytest.mark.parametrize("read", ["a global", "a closure", "the loss's object", "a tensor, edited"])
def test_a_value_that_changes_at_every_step_is_not_compiled_at_every_step(graphs, read):
    history, said, *_ = train(*READS[read](), [0.1 * (i + 1) for i in range(10)])
    assert history.how == "all models at once"
    assert len(said) == 1
    assert "keeps changing" in said[0]
    name = {"a global": "FACTOR", "a closure": "factor", "the loss's object": "loss_fn.factor"}
    assert name.get(read, "READ.table") in said[0]
    assert "buffer" in said[0]
    assert len(graphs) == 4


def test_an_equal_value_is_not_compiled_again(graphs):
    history, said, *_ = train(*READS["a new object"]()[:2], lambda v: set_global(float(str(v))), [1.0] * 5)
    assert (history.how, said, len(graphs)) == ("compiled", [], 1)


# -------------------------------------------------------------- with the real compiler


WEIGHTED = {
    "a half": lambda outputs, targets: 0.5 * mse_loss(outputs, targets),
    "an eighth of a sum": lambda outputs, targets: mse_loss(outputs, targets, reduction="sum") / 8,
    "two terms": lambda outputs, targets: mse_loss(outputs, targets) + 0.1 * l1_loss(outputs, targets),
}


@pytest.mark.parametrize("loss", WEIGHTED)
def test_weighted_losses_compile(loss):
    history, said, *_ = train(Net, WEIGHTED[loss], lambda value: None, [1.0, 1.0])
    assert (history.how, said) == ("compiled", [])


def test_inductor_has_each_new_value():
    history, said, *_ = train(*READS["a class attribute"](), [1.0, 2.0, 1.0])
    assert (history.how, said) == ("compiled", [])


# -------------------------------------------------------------- what a traced call may not change


CALLS = 0


class Counting:
    calls = 0

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return mse_loss(outputs, targets) * float(self.calls)


class Keeping(Counting):
    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.seen.append(targets.detach())
        return mse_loss(outputs, targets) * float(len(self.seen))


class Late(Counting):
    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.late = getattr(self, "late", 0) + 1
        return mse_loss(outputs, targets) * float(self.late)


def count_global(outputs: Tensor, targets: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return mse_loss(outputs, targets) * float(CALLS)


def count_on_itself(outputs: Tensor, targets: Tensor) -> Tensor:
    count_on_itself.calls = getattr(count_on_itself, "calls", 0) + 1
    return mse_loss(outputs, targets) * float(count_on_itself.calls)


def count_nonlocal() -> Any:
    calls = 0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return mse_loss(outputs, targets) * float(calls)

    return loss_fn


def count_in(total: Any) -> Any:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        total[0] += 1
        return mse_loss(outputs, targets) * total[0]

    return loss_fn


class Normed(nn.Module):
    """A frozen network in train mode: its BatchNorm keeps statistics, and counts them by no version."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.BatchNorm1d(2).double().requires_grad_(False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs, self.norm(targets)) + self.norm.running_mean.sum()


def draw_of(generator: Any) -> Any:
    return lambda outputs, targets: mse_loss(outputs, targets) * generator.random()


def endless() -> Any:
    counter = itertools.count(1)
    return lambda outputs, targets: mse_loss(outputs, targets) * float(next(counter))


def reset() -> None:
    global CALLS
    CALLS = 0
    vars(count_on_itself).clear()


CHANGES = {
    "its own count": (Counting, "loss_fn.calls"),
    "a list": (Keeping, "loss_fn.seen"),
    "a late attribute": (Late, "loss_fn.late"),
    "a global": (lambda: count_global, "CALLS"),
    "a function's attribute": (lambda: count_on_itself, "loss_fn.calls"),
    "a closure": (count_nonlocal, "calls"),
    "a tensor": (lambda: count_in(torch.zeros(1)), "total"),
    "an array": (lambda: count_in(np.zeros(1)), "total"),
    "a network's statistics": (Normed, "loss_fn.norm"),
    "a generator of Python's": (lambda: draw_of(random.Random(3)), "generator"),
    "a generator of numpy's": (lambda: draw_of(np.random.default_rng(3)), "generator"),
    "an iterator": (endless, "counter is an iterator"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tracing_leaves_no_trace(graphs, change):
    """A loss that counts its calls is called as often as alone, and each step's factor is the one alone."""
    make, name = CHANGES[change]
    torch.manual_seed(0)
    models, data = [nn.Linear(3, 2).double() for _ in range(M)], batches(3)
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATES)
    reset()
    with pytest.warns(UserWarning, match=f"compile=True: the steps run uncompiled, because .*{name}"):
        history = fit(batch, optimizer, data, make(), compile=True, chunk_size=None, progress=False)
    for m, model in enumerate(models):
        reset()
        losses = train_alone([model], data, loss_fn=make(), seeds=None, configs={"lr": RATES[m]})
        torch.testing.assert_close(history.loss[:, m : m + 1], losses, rtol=1e-9, atol=1e-12)
    assert not graphs


@functools.cache
def table(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64) + 1


def test_a_cache_keeps_nothing_that_a_traced_call_computed(graphs):
    table.cache_clear()
    history, said, *_ = train(lambda: Net(lambda: table(2)), mse_loss, lambda value: None, [1.0] * 2)
    assert (history.how, said) == ("compiled", [])
    assert table(2).tolist() == [1.0, 2.0]


def test_an_error_while_tracing_undoes_what_the_call_had_changed(graphs):
    criterion = Counting()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        criterion.calls += 1
        return mse_loss(outputs, targets) * outputs.sum().item()

    batch = ModelBatch([nn.Linear(3, 2).double() for _ in range(M)])
    step = CompiledStep(batch, OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1), StepOptions(loss_fn))
    assert step.attempt(*batches(1)[0]) is None
    assert step.reason
    assert criterion.calls == 0


@dataclass
class Holder:
    values: list = field(default_factory=lambda: list(range(30_000)))


def test_what_is_too_much_to_look_at_runs_uncompiled(graphs):
    held = Holder()
    history, said, *_ = train(Net, weighted(mse_loss, lambda: held.values[1]), lambda value: None, [1.0])
    assert "more than 20,000 Python values" in said[0]
    assert history.how == "all models at once"
