"""What models return around their tensors: objects are rebuilt around the stacked ones, as each model makes its own."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from oracle import SEEDS, M, assert_same_models, assert_same_parameters, close, train_alone, trained_alone
from torch import Tensor, nn
from torch import distributions as D
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from mbkit import BatchingError, ModelBatch, OptimizerFactory, fit
from mbkit.vmap import PerModel, PerModelValue

B = F = M  # so that a dimension taken for another one goes unnoticed by shapes
ROADS = {"at once": {}, "a layer in turn": {"model_by_model": ["make"]}, "in turn": {"model_by_model": [""]}}


class Layer:
    """As one layer of a key-value cache: made empty, filled by the call."""

    is_sliding = False

    def __init__(self) -> None:
        self.keys, self.seen, self.dtype = None, 0, torch.float64

    def update(self, keys: Tensor) -> None:
        self.keys, self.seen = keys, self.seen + 1


class Slots:
    __slots__ = ("hidden", "x")

    def __init__(self, x: Tensor, hidden: Any) -> None:
        self.x, self.hidden = x, hidden


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    size: int
    hidden: tuple = ()


class Pair(NamedTuple):
    x: Tensor
    count: int


class Linked:
    """A node that its child points back to."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.child = x, SimpleNamespace(parent=self, same=x, name="child")


def cache(x: Tensor) -> Any:
    layers = [Layer(), Layer()]
    for layer in layers:
        layer.update(x * 2)
    return {"logits": x, "cache": SimpleNamespace(layers=layers, last=layers[-1]), "nothing": None}


def packed(x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x.unsqueeze(-1), torch.tensor([F, 3, 2, 2]), batch_first=True)


def closure(x: Tensor) -> SimpleNamespace:
    return SimpleNamespace(x=x, decode=lambda z: x + z, double=lambda z: 2 * z)


# name: the object that forward makes, and all that is read of it
OBJECTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], list[Any]]]] = {
    "a cache in a dict": (
        cache,
        lambda o: [o["logits"], o["cache"].last.keys, o["cache"].last.seen, o["cache"].last is o["cache"].layers[1]],
    ),
    "slots": (lambda x: Slots(x, [x.sin(), 3]), lambda o: [o.x, *o.hidden, type(o) is Slots]),
    "a frozen dataclass": (lambda x: Frozen(x, 3, (x.cos(),)), lambda o: [o.x, o.size, *o.hidden]),
    "a named tuple": (lambda x: Pair(x, 2), lambda o: [*o, o.count, type(o) is Pair]),
    "a circle": (Linked, lambda o: [o.x, o.child.same is o.x, o.child.parent is o, o.child.name]),
    "a mapping": (lambda x: UserDict(x=x, shape=x.shape), lambda o: [o["x"], o["shape"], type(o) is UserDict]),
    "a function": (closure, lambda o: [o.decode(1.0), o.double(o.x)]),
    "a partial and a method": (
        lambda x: SimpleNamespace(x=x, add=partial(torch.add, x), read=Linked(x).__getattribute__),
        lambda o: [o.add(o.x), o.read("child").same],
    ),
    "a packed sequence": (packed, lambda o: [o.data]),
}


class Net(nn.Module):
    """Returns an object that a layer of it has made."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.make = nn.Linear(3, F), Make(make)

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(x))


class Make(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def nets(make: Callable[[Tensor], Any], count: int = M, kind: type = Net) -> list[nn.Module]:
    return [kind(make).double() for _ in range(count)]


def points(steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(B, 3).double(), torch.randn(B, F).double()) for _ in range(steps)]


def assert_alike(got: list[Any], lone: list[list[Any]]) -> None:
    """Compare what is read of a batch's output with what is read of each model's."""
    assert len(got) == len(lone[0])
    for value, *own in zip(got, *lone, strict=True):
        if isinstance(value, Tensor):
            close(value, torch.stack(own))
        else:
            assert all(value == one for one in own)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_rebuilt_around_stacked_tensors(name: str, road: str) -> None:
    make, read = OBJECTS[name]
    for count in (M, 1):
        models, x = nets(make, count), points()[0][0]
        batch = ModelBatch(models, **ROADS[road])
        first = batch(x)
        assert_alike(read(first), [read(model(x)) for model in models])
        batch(x + 1)  # leaves what is held as it was
        assert_alike(read(first), [read(model(x)) for model in models])


def total(read: Callable[[Any], list[Any]], out: Any, y: Tensor) -> Tensor:
    """A loss of all that is read; each model's tensors have no dimension for models."""
    tensors = [value for value in read(out) if isinstance(value, Tensor)]
    assert all(tensor.dim() <= 2 for tensor in tensors)
    return sum((tensor.square().sum() for tensor in tensors), (tensors[0] * y).sum() if y.dim() else 0)


@pytest.mark.parametrize("how", [{"chunk_size": M}, {"chunk_size": 3}, {"chunk_size": 1}, {"compile": True}], ids=str)
@pytest.mark.parametrize("name", ["a cache in a dict", "slots", "a circle", "a function"])
def test_a_loss_sees_each_models_own_object(name: str, how: dict[str, Any]) -> None:
    make, read = OBJECTS[name]
    models, data, loss_fn = nets(make), points(), partial(total, read)
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.01)
    with warnings.catch_warnings():  # what cannot be compiled runs uncompiled
        warnings.filterwarnings("ignore", message="compile=True")
        fit(batch, optimizer, data, loss_fn, progress=False, shared_targets=True, **how)
    assert_same_parameters(batch.models, trained_alone(models, data, loss_fn=loss_fn, configs={"lr": 0.01}))


class Capturing(nn.Module):
    """Registers hooks at its first call, through which it returns what its layers make, and notes it in its config."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.layers, self.config = nn.Sequential(nn.Linear(3, F), nn.Tanh(), nn.Linear(F, F)), config

    def forward(self, x: Tensor) -> Any:
        if not getattr(self, "hooks_installed", False):
            for layer in self.layers:
                layer.register_forward_hook(capture("hidden"))
            self.hooks_installed = True
        if self.config.problem is None:
            self.config.problem = "regression"
        token = CAPTURED.set([])
        y, hidden = self.layers(x), tuple(CAPTURED.get())
        CAPTURED.reset(token)
        return SimpleNamespace(y=y, hidden=hidden, problem=self.config.problem)


CAPTURED: ContextVar[list[Tensor]] = ContextVar("captured")


def capture(key: str) -> Callable:
    def short(value: Any) -> Any:
        return value

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if key == "hidden":
            CAPTURED.get().append(short(output))

    return hook


@pytest.mark.filterwarnings("ignore:.* runs model by model")
@pytest.mark.parametrize("how", [{"chunk_size": M}, {"chunk_size": 3}, {"chunk_size": 1}], ids=str)
def test_hooks_and_notes_of_the_first_call(how: dict[str, Any]) -> None:
    models = [Capturing(SimpleNamespace(problem=None)).double() for _ in range(M)]

    def loss_fn(out: Any, y: Tensor) -> Tensor:
        if out.problem != "regression":
            raise ValueError("not noted")
        return sum(hidden.square().mean() for hidden in out.hidden) + (out.y - y).square().mean()

    data = points()
    batch = ModelBatch(copy.deepcopy(models), seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.01)
    fit(batch, optimizer, data, loss_fn, progress=False, shared_targets=True, **how)
    lone = trained_alone(models, data, loss_fn=loss_fn, configs={"lr": 0.01})
    assert_same_parameters(batch.models, lone)
    hidden, x = batch(data[0][0]).hidden, data[0][0]
    assert len(hidden) == 3
    close(hidden[1], torch.stack([model(x).hidden[1] for model in lone]))
    assert batch[0].config.problem == "regression"


def test_notes_that_differ_between_the_models_are_refused() -> None:
    class Notes(Capturing):
        def forward(self, x: Tensor) -> Any:
            self.config.problem = f"{self.layers(x).sum().item():.9f}"
            return self.layers(x)

    batch = ModelBatch([Notes(SimpleNamespace(problem=None)).double() for _ in range(M)], model_by_model=[""])
    with pytest.raises(BatchingError, match="calls keep values that differ between the models in an object"):
        batch(points()[0][0])


# ------------------------------------------------------------------ distributions
class Posterior(nn.Module):
    """Returns a distribution, made of what comes of the input and of parameters of its own."""

    def __init__(self, make: Callable[..., D.Distribution]) -> None:
        super().__init__()
        self.fc, self.make = nn.Linear(3, F), make
        self.scale, self.matrix = nn.Parameter(torch.rand(()) + 0.5), nn.Parameter(torch.rand(F, F))

    def forward(self, x: Tensor) -> D.Distribution:
        return self.make(self.fc(x), self.scale, self.matrix.tril() + torch.eye(F, dtype=x.dtype))


def mixture(h: Tensor, s: Tensor, w: Tensor) -> D.Distribution:
    return D.MixtureSameFamily(D.Categorical(logits=h), D.Normal(h, w.exp()))


def moved(h: Tensor, s: Tensor, w: Tensor) -> D.Distribution:
    shift = D.AffineTransform(torch.zeros_like(s), s)
    inner = D.ComposeTransform([D.AffineTransform(w[0], s).inv, D.SigmoidTransform()])
    return D.TransformedDistribution(D.Normal(h, 1.0), [shift, inner])


DISTRIBUTIONS: dict[str, Callable[..., D.Distribution]] = {
    "normal": lambda h, s, w: D.Normal(h, s),
    "independent": lambda h, s, w: D.Independent(D.Laplace(h, w.exp()), 1),
    "one matrix for the whole batch": lambda h, s, w: D.MultivariateNormal(h, scale_tril=w),
    "a matrix each": lambda h, s, w: D.MultivariateNormal(h, torch.eye(F, dtype=h.dtype) * h.exp().unsqueeze(-1)),
    "low rank": lambda h, s, w: D.LowRankMultivariateNormal(h, w[:, :2], w[0].exp()),
    "categorical": lambda h, s, w: D.Categorical(logits=h),
    "mixture": mixture,
    "transforms": moved,
    "log normal": lambda h, s, w: D.LogNormal(h, s),
    "one for all inputs": lambda h, s, w: D.Normal(h.mean(), s),
}


@pytest.mark.parametrize("road", ["at once", "in turn"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_of_m_models(name: str, road: str) -> None:
    models, (x, _) = nets(DISTRIBUTIONS[name], kind=Posterior), points()[0]
    q = ModelBatch(models, **ROADS[road])(x)
    lone = [model(x) for model in models]
    samples = [one.sample((5,)) for one in lone]
    assert q.batch_shape == (M, *lone[0].batch_shape)
    assert q.event_shape == lone[0].event_shape
    assert q.sample((2,)).shape == (2, M, *lone[0].batch_shape, *lone[0].event_shape)
    got, expected = q.log_prob(torch.stack(samples, 1)), [o.log_prob(s) for o, s in zip(lone, samples, strict=True)]
    close(got, torch.stack(expected, 1))
    if name not in ("mixture", "transforms", "log normal"):
        close(q.entropy(), torch.stack([one.entropy() for one in lone]))
        close(D.kl_divergence(q, q), torch.zeros_like(q.entropy()))
    if isinstance(q, D.Normal):
        prior = D.Normal(torch.zeros((), dtype=x.dtype), 2.0)
        close(D.kl_divergence(q, prior), torch.stack([D.kl_divergence(one, prior) for one in lone]))


def elbo(q: D.Distribution, y: Tensor) -> Tensor:
    z = q.rsample()
    if z.shape != y.shape:
        raise ValueError("not a lone model's")
    return (z - y).square().mean() + (q.log_prob(z) - D.Normal(0.0, 1.0).log_prob(z).sum(-1)).mean()


@pytest.mark.parametrize("how", [{"chunk_size": M}, {"chunk_size": 2}, {"chunk_size": 1}], ids=str)
@pytest.mark.parametrize("name", ["independent", "one matrix for the whole batch"])
def test_an_elbo_of_a_returned_distribution(name: str, how: dict[str, Any]) -> None:
    models, data = nets(DISTRIBUTIONS[name], kind=Posterior), points()
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The loss function runs model by model")
        fit(batch, optimizer, data, elbo, progress=False, shared_targets=True, **how)
    lone = trained_alone(models, data, loss_fn=elbo, configs={"lr": 0.01})
    assert_same_parameters(batch.models, lone)


# ------------------------------------------------------------------ what is not a tensor
def test_numbers_that_differ_are_one_per_model() -> None:
    models, (x, y) = nets(lambda h: SimpleNamespace(h=h, top=h.max().item(), word="a", rows=len(h))), points()[0]
    batch = ModelBatch(models, **ROADS["in turn"])
    out = batch(x)
    assert isinstance(out.top, PerModel)
    assert out.top.values == tuple(model(x).top for model in models)
    assert (out.word, out.rows) == ("a", B)

    def loss_fn(out: Any, y: Tensor) -> Tensor:
        return (out.h * y).mean() * out.top

    losses = batch.compute_loss(out, y, loss_fn, "none", shared_targets=True)
    close(losses, torch.stack([loss_fn(model(x), y) for model in models]))


def test_what_cannot_be_rebuilt_is_one_per_model() -> None:
    def rows(h: Tensor) -> Iterator[Tensor]:
        yield from h

    models, (x, y) = nets(lambda h: {"h": h, "rows": rows(h), "name": f"{h.sum().item():.9f}"}), points()[0]
    out = ModelBatch(models, **ROADS["in turn"])(x)
    for m, model in enumerate(models):
        alone = model(x)
        close(torch.stack(list(out["rows"].values[m])), torch.stack(list(alone["rows"])))
        assert out["name"].values[m] == alone["name"]

    batch = ModelBatch(nets(lambda h: {"h": h, "rows": rows(h)}))
    with pytest.warns(UserWarning, match="it returns a generator, which cannot be one object for all models"):
        out = batch(x)
    with pytest.warns(UserWarning, match="loss function runs model by model"):
        losses = batch.compute_loss(
            out, y, lambda out, y: (torch.stack(list(out["rows"])) - y).mean(), "none", shared_targets=True
        )
    assert isinstance(out["rows"], PerModelValue)
    close(losses, (out["h"] - y).mean((1, 2)))


def test_an_error_tells_the_beginning_of_a_large_value() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, F)

        def forward(self, x: Tensor) -> Any:
            return {"h": self.fc(x), "mask": {"a" * 10_000: 1} if self.fc.weight.sum() > 0 else x}

    models = [Grows().double() for _ in range(M)]
    for m, model in enumerate(models):
        nn.init.constant_(model.fc.weight, 1.0 - 2 * (m % 2))
    with pytest.raises(Exception, match=r"for model 0") as caught:
        ModelBatch(models, model_by_model=[""])(points()[0][0])
    assert len(str(caught.value)) < 500


def test_objects_that_a_model_holds_are_left_as_they_are() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.prior = nn.Linear(3, F), D.Normal(torch.zeros(F).double(), 1.0)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x), self.prior

    models, (x, _) = [Holds().double() for _ in range(M)], points()[0]
    batch = ModelBatch(copy.deepcopy(models))
    for _ in range(2):
        out, prior = batch(x)
        assert prior.batch_shape == (M, F)
        close(out, torch.stack([model(x)[0] for model in models]))
    assert all(model.prior.batch_shape == (F,) for model in batch.models)


class Kernel(nn.Module):
    """Knows the shape of its batch, as GPyTorch's kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self._batch_shape = nn.Parameter(torch.rand(1, 1) + 0.5), torch.Size([])


class Covariance:
    """Is worked out when it is asked for, and remembers its size, as GPyTorch's."""

    def __init__(self, kernel: Kernel, x: Tensor) -> None:
        self.kernel, self.x = kernel, x

    def size(self) -> torch.Size:
        return (
            vars(self)
            .setdefault("_memoize_cache", {})
            .setdefault("size", self.kernel._batch_shape + self.x.shape[-1:] * 2)
        )

    def evaluate(self) -> Tensor:
        values = torch.exp(-(self.x[..., :, None] - self.x[..., None, :]).square() / self.kernel.width)
        assert values.shape == self.size()
        return values + torch.eye(values.shape[-1])


class Process(nn.Module):
    def __init__(self, lazy: bool) -> None:
        super().__init__()
        self.kernel, self.mean, self.lazy = Kernel(), nn.Linear(1, 1), lazy

    def forward(self, x: Tensor) -> Any:
        covariance = Covariance(self.kernel, x)
        assert covariance.size() == (len(x), len(x))
        return covariance if self.lazy else D.MultivariateNormal(self.mean(x[:, None])[:, 0], covariance.evaluate())


@pytest.mark.parametrize("slow", [(), ("",)])
def test_what_is_worked_out_later_has_the_size_of_all_models(slow):
    models, x = [Process(lazy=True).double() for _ in range(3)], torch.randn(4, dtype=torch.float64)
    got = ModelBatch(models, model_by_model=slow)(x).evaluate()
    torch.testing.assert_close(got, torch.stack([model(x).evaluate() for model in models]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [None, 2, 1])
def test_a_process_over_all_inputs_is_trained_as_alone(size):
    models = [Process(lazy=False).double() for _ in range(3)]
    pairs = [(torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)) for _ in range(3)]
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.05)
    fit(batch, optimizer, pairs, lambda q, y: -q.log_prob(y), chunk_size=size, progress=False)
    train_alone(models, pairs, loss_fn=lambda q, y: -q.log_prob(y), configs={"lr": 0.05})
    assert_same_models(batch, models)
