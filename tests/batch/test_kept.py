"""What loss functions, hooks and caches keep between calls: each model's own, the same on every road, and usable."""

from __future__ import annotations

import collections
import contextvars
import copy
import functools
import logging
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import M, assert_same_parameters, train_alone
from torch import Tensor, nn
from torch.nn import functional as F

from mbkit import BatchingError, ModelBatch, OptimizerFactory, fit
from mbkit.batch.python_values import PythonValues
from mbkit.vmap import PerModel

ROADS = [{"chunk_size": None}, {"chunk_size": 2}, {"chunk_size": 3}, {"chunk_size": 1}, {}]
STEPS = 5
T = {"steps": 0}
COUNT = 0


class Annealed:
    """Counts its calls in a number."""

    def __init__(self) -> None:
        self.t = 0

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        self.t += 1
        return F.cross_entropy(out, y) + 0.1 * self.t * out.square().mean()


class Counted(nn.Module):
    """Counts them in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("t", torch.zeros(()))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        self.t += 1
        return F.cross_entropy(out, y) + 0.1 * self.t * out.square().mean()


class Centered(nn.Module):
    """Keeps a running mean of the outputs, as DINO's loss does."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(1, 3, dtype=torch.float64))
        self.in_place = in_place

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(out - self.center, y)
        mean = out.detach().mean(0, keepdim=True)
        if self.in_place:
            self.center.mul_(0.5).add_(0.5 * mean)
        else:
            self.center = 0.5 * self.center + 0.5 * mean
        return loss


class Scaled:
    """Keeps the last loss as a Python number, which makes it run model by model."""

    def __init__(self) -> None:
        self.last = 1.0

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(out, y) / self.last
        self.last = loss.item() * self.last
        return loss


def in_a_closure() -> Callable:
    count = 0

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return F.cross_entropy(out, y) * count

    return loss_fn


def in_a_list() -> Callable:
    logs: list[Tensor] = []

    def loss_fn(out: Tensor, y: Tensor, kept: list[Tensor] = logs) -> Tensor:
        loss = F.cross_entropy(out, y)
        kept.append(loss.detach())
        return loss * kept[0]  # and reads what it has kept

    return loss_fn


def in_a_global() -> Callable:
    T["steps"] = 0

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        T["steps"] += 1
        return F.cross_entropy(out, y) * T["steps"]

    return loss_fn


def in_a_rebound_global() -> Callable:
    global COUNT
    COUNT = 0

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return F.cross_entropy(out, y) * COUNT

    return loss_fn


def in_a_namespace() -> Callable:
    kept = types.SimpleNamespace(count=0)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        kept.count += 1
        return F.cross_entropy(out, y) * kept.count

    return loss_fn


def on_its_class() -> Callable:
    class Loss:
        count = 0

        def __call__(self, out: Tensor, y: Tensor) -> Tensor:
            Loss.count += 1
            return F.cross_entropy(out, y) * self.count

    return Loss()


def on_itself() -> Callable:
    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        loss_fn.count = getattr(loss_fn, "count", 0) + 1
        return F.cross_entropy(out, y) * loss_fn.count

    return loss_fn


def under_a_made_up_name() -> Callable:
    class Loss:
        def __call__(self, out: Tensor, y: Tensor) -> Tensor:
            setattr(self, "co" + "unt", vars(self).get("co" + "unt", 0) + 1)
            return F.cross_entropy(out, y) * vars(self)["co" + "unt"]

    return Loss()


def as_a_partial() -> Callable:
    return functools.partial(Annealed().__call__)


LOSSES = {
    "number": Annealed,
    "buffer": Counted,
    "center": lambda: Centered(False),
    "center in place": lambda: Centered(True),
    "number per model": Scaled,
    "closure": in_a_closure,
    "list": in_a_list,
    "global": in_a_global,
    "rebound global": in_a_rebound_global,
    "namespace": in_a_namespace,
    "class": on_its_class,
    "function": on_itself,
    "made-up name": under_a_made_up_name,
    "partial": as_a_partial,
}


def made() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(M)]


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 7, 4, generator=generator, dtype=torch.float64)
    return [(one, torch.randint(3, (7,), generator=generator)) for one in x]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[nn.Module]]:
    """The models trained by plain PyTorch, each with a loss function to itself."""
    trained = {}
    for name, make in LOSSES.items():
        trained[name] = made()
        for model in trained[name]:
            train_alone([model], data(), loss_fn=make(), seeds=None, configs={"lr": 0.2})
    return trained


@pytest.mark.filterwarnings("ignore:The loss function runs model by model")
@pytest.mark.parametrize("road", ROADS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_keeps_is_each_models_own(name: str, road: dict, alone: dict) -> None:
    batch, loss_fn = ModelBatch(made()), LOSSES[name]()
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.2)
    fit(batch, optimizer, data(), loss_fn, progress=False, **road)
    assert_same_parameters(batch.models, alone[name])
    if name == "number":
        assert loss_fn.t == STEPS
    if name == "buffer":
        assert loss_fn.t.tolist() == STEPS
    if name.startswith("center"):
        assert loss_fn.center.shape == (M, 1, 3)
        assert (loss_fn.center + 0).isfinite().all()
    if name == "number per model":
        assert isinstance(loss_fn.last, PerModel)
        assert len(loss_fn.last.values) == M
    if name == "list":
        (logs,) = loss_fn.__defaults__
        assert [tuple((log + 0).shape) for log in logs] == [(M,)] * STEPS


@pytest.mark.filterwarnings("ignore:compile=True", "ignore:The loss function runs model by model")
@pytest.mark.parametrize("name", ["number", "buffer", "center", "list", "rebound global"])
def test_a_compiled_step_does_not_lose_what_a_loss_keeps(name: str, alone: dict) -> None:
    batch = ModelBatch(made())
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.2)
    fit(batch, optimizer, data(), LOSSES[name](), progress=False, compile=True)
    assert_same_parameters(batch.models, alone[name])


class Weighted(nn.Module):
    """A criterion that is trained with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) * torch.exp(-self.log_var) + self.log_var


@pytest.mark.parametrize("road", ROADS, ids=str)
@pytest.mark.parametrize("way", ["module", "closure", "method", "partial"])
def test_a_criterion_that_is_trained_is_refused_by_name(way: str, road: dict) -> None:
    criterion = Weighted()
    loss_fn = {
        "module": criterion,
        "closure": lambda out, y: criterion(out, y) / 2,
        "method": criterion.forward,
        "partial": functools.partial(criterion.forward),
    }[way]
    batch = ModelBatch(made())
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.2)
    with pytest.raises(ValueError, match="got one that trains 'log_var', which all models would share: make it a part"):
        fit(batch, optimizer, data(), loss_fn, progress=False, **road)


def test_a_teacher_that_is_not_trained_may_have_parameters() -> None:
    teacher, batch = made()[0], ModelBatch(made())
    x, y = data()[0]

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(x)
        return F.mse_loss(out, wanted)

    losses = batch.compute_loss(batch(x), y, loss_fn, "none")
    torch.testing.assert_close(
        losses.tolist(), [loss_fn(model(x), y).item() for model in made()], rtol=1e-12, atol=1e-14
    )


class Recorder:
    """Keeps the latest output of a layer."""

    def __init__(self) -> None:
        self.out: Tensor | None = None

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.out = output.detach()

    def keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.out = output


@pytest.mark.filterwarnings("ignore:.* runs model by model")
@pytest.mark.parametrize("shared", [True, False])
def test_recorders_hold_each_models_own(shared: bool) -> None:
    models, x = made(), data()[0][0]
    recorders = [Recorder()] * M if shared else [Recorder() for _ in range(M)]
    for model, recorder in zip(models, recorders, strict=True):
        model[1].register_forward_hook(recorder.hook)
    models[1](x)  # what one of them has seen before makes no difference
    ModelBatch(models)(x)
    seen = [None if recorder.out is None else recorder.out + 0 for recorder in recorders]
    for m, model in enumerate(made()):
        torch.testing.assert_close(seen[m], model[:2](x).detach() if not shared else made()[-1][:2](x).detach())


SEEN: list[Tensor] = []
LATEST = Recorder()


class Watched(nn.Module):
    """Has a hook that keeps what forward or the loss reads; from the start, or from the first call on."""

    def __init__(self, hook: Callable, late: bool, reads: bool) -> None:
        super().__init__()
        self.first, self.out, self.reads = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), reads
        self.hooks = [hook] if late else []
        if not late:
            self.first.register_forward_hook(hook)

    def forward(self, x: Tensor) -> Tensor:
        if self.hooks:
            self.first.register_forward_hook(self.hooks.pop())
        h = self.first(x).tanh()
        return self.out(h) * (1 + sum(SEEN) / len(SEEN)) if self.reads else self.out(h)


def keep_mean(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    SEEN.append(output.detach().mean())


def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    SEEN.append(output)


def keep_latest(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    LATEST.out = output


def with_seen(out: Tensor, y: Tensor) -> Tensor:
    loss = F.mse_loss(out, y) + 0.1 * sum(seen.square().mean() for seen in SEEN)
    SEEN.clear()
    return loss


def with_latest(out: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(out, y) + 0.1 * LATEST.out.square().mean()


WATCHED = {
    "forward reads": (keep_mean, False, True, F.mse_loss),
    "forward reads, from the first call on": (keep_mean, True, True, F.mse_loss),
    "the loss reads a list": (keep, False, False, with_seen),
    "the loss reads an object": (keep_latest, False, False, with_latest),
    "the loss reads what a method keeps": (LATEST.keep, False, False, with_latest),
}


@pytest.mark.filterwarnings("ignore:.* runs model by model")
@pytest.mark.parametrize("road", [*ROADS, "a loop"], ids=str)
@pytest.mark.parametrize("name", WATCHED)
def test_what_hooks_keep_and_others_read_is_each_models_own(name: str, road: Any) -> None:
    *what, loss_fn = WATCHED[name]
    pairs = [tuple(torch.randn(5, n, dtype=torch.float64) for n in (3, 2)) for _ in range(STEPS)]
    models = [Watched(*what) for _ in range(M)]
    lones = [Watched(*what) for _ in range(M)]
    for lone, model in zip(lones, models, strict=True):
        lone.load_state_dict(model.state_dict())
        train_alone([lone], pairs, loss_fn=loss_fn, seeds=None, configs={"lr": 0.1})
        SEEN.clear()
        LATEST.out = None
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    if road != "a loop":
        fit(batch, optimizer, pairs, loss_fn, progress=False, **road)
    else:
        if name == "the loss reads what a method keeps":  # and is known too late for the first call
            with pytest.raises(BatchingError, match="empty it and call the batch again"):
                batch.compute_loss(batch(pairs[0][0]), pairs[0][1], loss_fn)
        for x, y in pairs:
            optimizer.zero_grad()
            batch.compute_loss(batch(x), y, loss_fn).backward()
            optimizer.step()
    SEEN.clear()
    LATEST.out = None
    assert_same_parameters(batch.models, lones)


CACHE: dict[int, Tensor] = {}


@functools.lru_cache(None)
def ramp(n: int) -> Tensor:
    return torch.arange(n) / 10 + torch.zeros(n)


def ramp_by_hand(n: int) -> Tensor:
    if n not in CACHE:
        CACHE[n] = torch.arange(n) / 10 + torch.zeros(n)
    return CACHE[n]


class Cached(nn.Module):
    def __init__(self, table: Callable) -> None:
        super().__init__()
        self.layer, self.by_hand = nn.Linear(4, 1, dtype=torch.float64), table is ramp_by_hand

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + (ramp_by_hand if self.by_hand else ramp)(x.shape[1]))


@pytest.mark.parametrize("table", [ramp, ramp_by_hand])
def test_a_table_that_a_call_of_the_batch_has_cached_serves_everyone(table: Callable) -> None:
    ramp.cache_clear()
    CACHE.clear()
    models = [Cached(table) for _ in range(M)]
    expected = [copy.deepcopy(model)(data()[0][0]).detach() for model in models]
    ramp.cache_clear()
    CACHE.clear()
    batch = ModelBatch(models)
    for _ in range(2):
        out = batch(data()[0][0])
        for m, model in enumerate(models):
            torch.testing.assert_close(out[m].detach(), expected[m], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(model(data()[0][0]).detach(), expected[m], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(batch[m](data()[0][0]).detach(), expected[m], rtol=1e-12, atol=1e-14)


def test_a_loss_that_keeps_what_cannot_be_put_together_is_refused() -> None:
    class Odd:
        def __init__(self) -> None:
            self.seen: list[float] = []

        def __call__(self, out: Tensor, y: Tensor) -> Tensor:
            loss = F.cross_entropy(out, y)
            if loss.item() > threshold:
                self.seen.append(loss.item())
            return loss

    x, y = data()[0]
    each = sorted(F.cross_entropy(model(x), y).item() for model in made())
    threshold = (each[1] + each[2]) / 2
    batch = ModelBatch(made())
    with pytest.raises(RuntimeError, match="keeps more values for one model than for another"):
        batch.compute_loss(batch(x), y, Odd())


# ------------------------------------------------------------------ what large libraries have
class Made(collections.OrderedDict):
    """A table of classes that gives out objects, as a library has it for its activations."""

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__(name)()


LAYERS, DEFAULTS, KINDS = Made(tanh=nn.Tanh), {"a": [1.0]}, [list[int], dict[str, int]]


class FromALibrary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        assert not isinstance(x, KINDS[0].__origin__)
        assert "a" in DEFAULTS
        return LAYERS["tanh"](self.fc(x))


def test_tables_of_a_library_stay_as_they_are() -> None:
    models, batches = [FromALibrary() for _ in range(M)], data()
    batch = ModelBatch(copy.deepcopy(models))
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    fit(batch, optimizer, batches, F.cross_entropy, progress=False)
    assert dict.__getitem__(LAYERS, "tanh") is nn.Tanh
    train_alone(models, batches, loss_fn=F.cross_entropy, configs={"lr": 0.1})
    assert_same_parameters(list(batch), models, 1e-11)


def test_code_that_leads_everywhere_is_looked_at_nearest_first() -> None:
    """A library's functions name modules that name others: the walk ends, with what stands near the layer in it."""
    far: dict[str, Any] = {"counter": [0]}
    lines = [f"def f{i}(x):\n    x.a{i} = x.b{i}\n    return f{i + 1}, T{i}, counter" for i in range(3000)]
    far |= {f"T{i}": types.SimpleNamespace(**{f"b{j}": [j] for j in range(i, i + 9)}) for i in range(3000)}
    exec("\n".join([*lines, "def f3000(x):\n    return counter"]), far)
    start = time.process_time()
    values = PythonValues([("first", far["f0"])], most=2000)
    assert "more than 2,000 Python values" in values.unseen
    assert any(place.owner is far["counter"] for place in values.places)
    assert time.process_time() - start < 20  # it took minutes and gigabytes when it went on to the end


LOCK, VARIABLE, LOGGER = threading.Lock(), contextvars.ContextVar("VARIABLE"), logging.getLogger(__name__)


def guarded(out: Tensor, y: Tensor) -> Tensor:
    """Uses objects that hold no attributes, and a logger, among code that may keep a value under any name."""
    with LOCK:
        VARIABLE.set(vars(LOGGER))
    return out.sum()


def test_what_has_no_attributes_is_met_once_and_a_logger_leads_nowhere() -> None:
    values = PythonValues([("guarded", guarded)])
    assert not values.unseen
    assert len(values.numbers) < 20
