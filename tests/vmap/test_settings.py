"""Settings that differ between the models: floats of the user's own classes, configuration objects, dicts.

What a call reads and cannot be routed runs model by model, and each model is still the one trained alone.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, Union

import pytest
import torch
from oracle import SEEDS, M, assert_same_parameters, train_alone
from torch import Tensor, nn

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.vmap import BatchingError, PerModel

STEPS, RATE = 4, 0.05
ROADS: dict[str, dict[str, Any]] = {
    "at once": {"chunk_size": None},
    "chunks": {"chunk_size": 2},
    "one by one": {"chunk_size": 1},
    "compiled": {"compile": True},
}


class Config:
    """As large libraries have them: one object, at hand in every layer."""

    def __init__(self, m: int) -> None:
        self.rate, self.size, self.names, self.kind = 0.1 * (m + 1), 3, ["a", "b"], None
        self.heads = 1 + m
        self.adapter = {"alpha": 8.0 * (m + 1), "rank": 2}

    @property
    def scale(self) -> float:
        return self.adapter["alpha"] / self.adapter["rank"]

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.rate


class Net(nn.Module):
    """A layer around whose result model m does something with its own settings."""

    def __init__(self, m: int, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.omega, self.scaling, self.use = nn.Linear(4, 4), 0.5 + 0.25 * m, {"default": 1.0 + m}, use
        self.config, self.unread = Config(m), 7.5 * m
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.use(self, self.fc(x)))


def note_kind(net: Net, x: Tensor) -> Tensor:
    if net.config.kind is None:
        net.config.kind = "regression"
    return x * net.config.rate


def first_of(net: Net, x: Tensor) -> Tensor:
    return x * next(value for key, value in net.scaling.items() if key in net.scaling)


# How a setting is used, and whether all models can do so at once.
USES: dict[str, tuple[Callable[[Net, Tensor], Tensor], bool]] = {
    "not at all": (lambda net, x: x.tanh(), True),
    "a float": (lambda net, x: torch.sin(net.omega * x) + x ** net.omega.__class__(2), True),
    "a float in an operator": (lambda net, x: nn.functional.leaky_relu(x, net.omega), True),
    "dropout": (lambda net, x: nn.functional.dropout(x, net.config.rate, net.training), True),
    "a dict": (lambda net, x: x * net.scaling["default"] + net.scaling.get("other", 1), True),
    "a dict walked through": (first_of, True),
    "inside an object": (lambda net, x: x * net.config.adapter["alpha"] + len(net.config.names), True),
    "what is alike": (lambda net, x: x.repeat(1, net.config.size)[:, :4] * net.config.adapter["rank"], True),
    "a property": (lambda net, x: x * net.config.scale, True),
    "a method": (lambda net, x: net.config.scaled(x), True),
    "written to": (note_kind, True),
    "compared, alike": (lambda net, x: x * 2 if net.omega > 0.1 else x, True),
    "compared, not alike": (lambda net, x: x * 2 if net.omega > 0.8 else x, False),
    "by Python's math": (lambda net, x: x * math.sqrt(net.omega), False),
    "by Python's math, compared": (lambda net, x: x * 2 if math.sqrt(net.omega) > 0.9 else x, False),
    "a whole number": (lambda net, x: x.repeat(1, net.config.heads)[:, :4] * net.config.heads, False),
}


def trained_both_ways(models: list[nn.Module], road: str) -> ModelBatch:
    """Train a batch of the models, and the models alone; compare."""
    batch = ModelBatch(copy.deepcopy(models), seeds=SEEDS)
    kind = {"dtype": torch.float64}
    data = [(torch.randn(5, 4, **kind), torch.randn(5, 2, **kind)) for _ in range(STEPS)]
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATE)
    fit(batch, optimizer, data, nn.functional.mse_loss, progress=False, **ROADS[road])
    train_alone(models, data, seeds=SEEDS, configs={"lr": RATE})
    assert_same_parameters(list(batch), models, 1e-11)
    return batch


@pytest.mark.filterwarnings("ignore:.*model by model", "ignore:compile=True")
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("use", USES)
def test_each_model_by_its_own(use: str, road: str) -> None:
    run, at_once = USES[use]
    models = [Net(m, run).double() for m in range(M)]
    batch = trained_both_ways(models, road)
    if road == "at once":
        assert (batch.model_by_model == set()) == at_once
    for lone, model in zip(batch, models, strict=True):  # what is taken out has its own again
        assert (lone.omega, lone.unread, lone.scaling) == (model.omega, model.unread, model.scaling)
        assert vars(lone.config) == vars(model.config)


def test_the_given_models_keep_theirs():
    models = [Net(m, note_kind) for m in range(2)]
    ModelBatch(models)(torch.randn(3, 4))
    assert [model.config.kind for model in models] == [None, None]


def test_some_of_the_models():
    models = [Net(m, USES["inside an object"][0]) for m in range(4)]
    batch, x = ModelBatch(models), torch.randn(3, 4)
    torch.testing.assert_close(batch.select([3, 1])(x), torch.stack([models[3](x), models[1](x)]))


def test_a_tensor_kept_in_an_object_of_each_models_own():
    """Model by model, it is the model's own object, and keeps what it is given."""

    def keep(net: Net, x: Tensor) -> Tensor:
        net.config.last = x.detach() + getattr(net.config, "last", 0)
        return x + net.config.last

    models = [Net(m, keep).double() for m in range(3)]
    batch, x = ModelBatch(copy.deepcopy(models)), torch.randn(3, 4).double()
    with pytest.warns(UserWarning, match=r"model by model.*'config\.last'"):
        outputs = [batch(x) for _ in range(2)]
    for m, model in enumerate(models):
        for step in range(2):
            torch.testing.assert_close(outputs[step][m], model(x))


def test_no_number_for_all_is_read_from_one_that_differs():
    number = PerModel([0.25, 0.5])
    for read in (float, math.sqrt, lambda n: torch.ones(2) * n, lambda n: nn.functional.dropout(torch.ones(2), n)):
        with pytest.raises(BatchingError):
            read(number)
    assert isinstance(number, float)


# ------------------------------------------------------------------ what stands there, and what calls have filled in
class Signature(NamedTuple):
    names: dict[str, Any]
    returns: Any


class Inspector:
    """Looks up what a class's functions take, and remembers it: the first one in a process has more to look up."""

    def __init__(self, first: bool) -> None:
        self.sources = {"forward": "def forward"} if first else {}
        self.signatures = {"scaled": Signature({"x": Union[Tensor, int], "by": list[int]}, inspect.signature)}  # noqa: UP007 - as typing makes them

    def taken(self, given: dict[str, Any]) -> dict[str, Any]:
        return {name: given[name] for name in self.signatures.get("scaled").names if name in given}


class Lazy(nn.Module):
    """Notes its name, and keeps what calls have filled in: a table, a flag, an attribute that was not there."""

    def __init__(self, m: int, read: str = "") -> None:
        super().__init__()
        self.fc, self.index, self.name, self.read = nn.Linear(4, 2).double(), m, f"net {m}", read
        self.table, self.looked_up = None, Inspector(m == 0)
        self._handle = self.fc.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(**self.looked_up.taken({"input": x})) if self.read == "signature" else self.fc(x)
        if self.read == "table":
            self.table = torch.full((2,), 3.0, dtype=x.dtype) if self.table is None else self.table
            return y * self.table
        if self.read == "flag" and not getattr(self, "_installed", False):
            self._installed = True
        return y * (1 + self.index) if self.read == "index" else y * len(self.name) if self.read == "name" else y


@pytest.mark.filterwarnings("ignore:.*model by model")
@pytest.mark.parametrize("road", ["at once", "chunks", "one by one"])
@pytest.mark.parametrize("called", [[], [0], [1], [0, 1, 3]])
@pytest.mark.parametrize("read", ["", "index", "name", "table", "flag"])
def test_what_differs_matters_where_it_is_read(read: str, called: list[int], road: str) -> None:
    models = [Lazy(m, read) for m in range(M)]
    for m in called:
        models[m](torch.ones(3, 4).double())
    batch = trained_both_ways(models, road)
    if road == "at once":
        fast = read not in ("index", "name") and (read == "" or not called)
        assert (batch.model_by_model == set()) == fast
    for lone, model in zip(batch, models, strict=True):
        assert (lone.index, lone.name, lone.__dict__.keys()) == (model.index, model.name, model.__dict__.keys())


def test_what_differs_is_named_where_it_is_read() -> None:
    with pytest.warns(UserWarning, match="model by model: .*it reads 'index', which is 0 for model 0 and 1 for"):
        ModelBatch([Lazy(m, "index") for m in range(2)])(torch.ones(3, 4).double())


def test_an_object_that_remembers_what_it_has_looked_up() -> None:
    names = {"input": Union[Tensor, int], "by": list[int]}  # noqa: UP007 - as typing makes them
    models = [Lazy(m, "signature") for m in range(M)]
    for model in models:
        model.looked_up.signatures["scaled"] = Signature(dict(names), inspect.signature)
    batch, x = ModelBatch(models), torch.randn(3, 4).double()
    torch.testing.assert_close(batch(x), torch.stack([model(x) for model in models]))
    assert batch.model_by_model == set()


def test_a_table_that_is_a_registered_tensor_is_refused() -> None:
    models = [Lazy(m) for m in range(2)]
    vars(models[1])["table"] = models[1].fc.bias
    with pytest.raises(ValueError, match="another 'table'"):
        ModelBatch(models)


class Noting(nn.Module):
    """Notes in its configuration what its calls have found out, and how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.config = nn.Linear(4, 2).double(), SimpleNamespace(kind=None, calls=0, names=["a"])

    def forward(self, x: Tensor) -> Tensor:
        self.config.calls += 1
        if self.config.kind is None:
            self.config.kind, self.config.first = "regression", self.config.calls
        return self.fc(x) * self.config.calls + self.config.first


@pytest.mark.parametrize("road", ["at once", "chunks", "one by one"])
def test_what_calls_note_in_an_object_that_all_models_share(road: str) -> None:
    models = [Noting() for _ in range(M)]
    batch = trained_both_ways(models, road)
    assert [vars(model.config) for model in batch] == [vars(model.config) for model in models]


def test_notes_that_differ_are_refused() -> None:
    class Measuring(Noting):
        def forward(self, x: Tensor) -> Tensor:
            self.config.kind = self.fc.weight.sum().item()
            return self.fc(x)

    batch = ModelBatch([Measuring() for _ in range(M)], model_by_model=[""])
    with pytest.raises(BatchingError, match="differ between the models in an object that all of them share"):
        batch(torch.ones(3, 4).double())
    assert batch[0].config.kind is None


class Drawn:
    """What an augmentation has drawn, under a name."""

    def __init__(self, name: str, data: Tensor) -> None:
        self.name, self.data = name, data


class Augmented(nn.Module):
    """Keeps what it has drawn last, in objects that it makes anew in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drawn = nn.Linear(4, 2).double(), []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn = [Drawn("noise", torch.rand_like(x))]
        return self.fc(x + self.drawn[0].data)


@pytest.mark.filterwarnings("ignore:.*model by model")
@pytest.mark.parametrize("road", ["at once", "chunks", "one by one"])
def test_objects_that_calls_make_are_each_models_own(road: str) -> None:
    models = [Augmented() for _ in range(M)]
    batch = trained_both_ways(models, road)
    for lone, model in zip(batch, models, strict=True):
        assert torch.equal(lone.drawn[0].data, model.drawn[0].data)
