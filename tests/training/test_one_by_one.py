"""One by one, on modules kept from step to step, each model is the one trained alone, whatever happens in between."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_flatten

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.batch.context import context_of
from mbkit.common.random_streams import GENERATOR
from mbkit.training import train_steps
from mbkit.training.chunks import Chunks
from mbkit.training.compiled import CompiledStep
from mbkit.training.options import StepOptions
from mbkit.training.step import make_update

M, B, K, STEPS = 3, 8, 3, 6
RATES = [0.01, 0.02, 0.03]


class Net(nn.Module):
    """BatchNorm, dropout at a rate of its own, tied weights, a buffer edited in place, a list and a dict."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second.weight = self.first.weight
        self.drop, self.out, self.scales = nn.Dropout(rate), nn.Linear(4, K), [1.0]
        self.factors, self.extra = {"on": 2.0}, {0.5}
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean()
        h = self.drop(self.norm(self.second(self.first(x).tanh())))
        return self.out(h) * sum(self.scales) * self.factors.get("on", 1.0) + sum(self.extra) * h[:, :K]


class Keeps(Net):
    """Assigns a buffer and a tensor anew in every call, and adds up in them."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__(rate)
        self.last = torch.zeros(()).double()

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.mean()
        self.last = self.last + self.first.weight.detach().sum()
        return super().forward(x) + self.last.sin()


class Counts(Keeps):
    """Counts its calls in Python."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Several(Net):
    """Returns more than one tensor."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        out = super().forward(x)
        return {"log": out.log_softmax(1), "sums": (x.sum(1), None)}


def models_of(cls: type[nn.Module] = Net) -> list[nn.Module]:
    return [cls(0.1 + 0.1 * m).double() for m in range(M)]


def data(each: bool = False) -> list[tuple[Tensor, Tensor]]:
    lead = (M,) if each else ()
    return [(torch.randn(*lead, B, 4).double(), torch.randint(K, (*lead, B))) for _ in range(STEPS)]


def nothing(model: Any, step: int) -> None:
    pass


def train_alone(
    model: nn.Module,
    m: int,
    pairs: list,
    between: Callable = nothing,
    each: bool = False,
    loss_fn: Callable = cross_entropy,
    cls: type = torch.optim.Adam,
) -> list[tuple[Tensor, Any]]:
    """Train model m in place in plain PyTorch; return each step's loss and outputs."""
    torch.manual_seed(m)
    optimizer, made = cls(model.parameters(), lr=RATES[m % M]), []
    for step, (x, y) in enumerate(pairs):
        between(model, step)
        optimizer.zero_grad()
        out = model(x[m] if each else x)
        loss = loss_fn(out, y[m] if each else y)
        loss.backward()
        optimizer.step()
        made.append((loss.detach(), out))
    return made


def assert_as_alone(
    models: list[nn.Module],
    pairs: list,
    between: Callable = nothing,
    each: bool = False,
    loss_fn: Callable = cross_entropy,
    cls: type = torch.optim.Adam,
    compiled: type | None = None,
) -> ModelBatch:
    """Train one by one and alone, do to the batch and to each lone model what `between` does, and compare."""
    lone, batch = copy.deepcopy(models), ModelBatch(models, not each, seeds=range(M))
    optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=RATES)
    way, made = Chunks(batch, 1), []
    graph = compiled and compiled(batch, optimizer, StepOptions(loss_fn))
    for step, (x, y) in enumerate(pairs):
        between(batch, step)
        done = graph and graph.attempt(x, y)
        made.append(done or make_update(optimizer, way, x, y, StepOptions(loss_fn)))
    for m, model in enumerate(lone):
        expected = train_alone(model, m, pairs, between, each, loss_fn, cls)
        for (losses, outputs), (loss, out) in zip(made, expected, strict=True):
            ours, theirs = tree_flatten((losses, outputs)), tree_flatten((loss, out))
            assert ours[1] == theirs[1]
            for mine, other in zip(ours[0], theirs[0], strict=True):
                torch.testing.assert_close(None if mine is None else mine[m], other, rtol=0, atol=1e-10)
        torch.testing.assert_close(batch[m].state_dict(), model.state_dict(), rtol=0, atol=1e-10)
        assert vars(batch[m]).get("calls") == vars(model).get("calls")
    return batch


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("cls", [Net, Keeps, Counts])
def test_each_model_is_the_one_trained_alone(cls, each):
    batch = assert_as_alone(models_of(cls), data(each), each=each)
    assert batch.model_by_model == set()


def test_several_outputs_keep_their_form():
    assert_as_alone(models_of(Several), data(), loss_fn=lambda out, y: nn.functional.nll_loss(out["log"], y))


def at_step_2(change: Callable[[Any], Any]) -> Callable[[Any, int], None]:
    return lambda model, step: change(model) if step == 2 else None


def own(model: Any) -> nn.Module:
    return context_of(model).template if isinstance(model, ModelBatch) else model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(own(model).drop, "p", 0.9),
        lambda model: own(model).drop.eval(),
        lambda model: own(model).first.bias.requires_grad_(False),
        lambda model: own(model).scales.append(0.5),
        lambda model: own(model).factors.update(off=own(model).factors.pop("on")),
        lambda model: own(model).extra.add(2.5),
        lambda model: own(model).out.register_forward_hook(lambda module, args, out: out * 2),
        lambda model: setattr(own(model), "norm", nn.Identity()),
        lambda model: own(model).out.weight.data.mul_(3),
        lambda model: setattr(own(model).out.weight, "data", own(model).out.weight.data * 3),
    ],
    ids="setting mode trained list dict set hook module edit data".split(),
)
def test_what_is_changed_between_two_steps_counts(graphs, change, compiled):
    """With SGD, since a bias before BatchNorm has no gradient but rounding, which Adam would blow up."""
    way = CompiledStep if compiled else None
    assert_as_alone(models_of(), data(), at_step_2(change), cls=torch.optim.SGD, compiled=way)
    assert bool(graphs) == compiled


@pytest.mark.parametrize("last", [2, 6])
def test_a_step_that_was_cut_short_leaves_no_gradient_and_no_state_behind(last):
    """A model's loss raises, after the backward passes of those before it."""
    models, pairs = models_of(Counts) + models_of(Counts), data()
    batch, calls = ModelBatch(models, seeds=range(2 * M)), itertools.count(1)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    way = Chunks(batch.eval(), 1)

    def loss_fn(outputs, targets):
        if next(calls) == last:
            raise RuntimeError("full")
        return cross_entropy(outputs, targets)

    before = {name: p.detach().clone() for name, p in batch.named_parameters()}
    with pytest.raises(RuntimeError, match="full"):
        make_update(optimizer, way, *pairs[0], StepOptions(loss_fn))
    torch.testing.assert_close(dict(batch.named_parameters()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in batch.parameters())
    lone = batch.models
    make_update(optimizer, way, *pairs[1], StepOptions(loss_fn))
    for m, model in enumerate(lone):
        cross_entropy(model(pairs[1][0]), pairs[1][1]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(batch.stacked_params[name].grad[m], p.grad, rtol=0, atol=1e-12)
        assert model.calls == batch[m].calls == 1


class Either(nn.Module):
    """Takes the one layer or the other, as its own input says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.never = nn.Linear(4, K), nn.Linear(4, K), nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_a_parameter_that_only_some_models_use_stays_where_it_is_in_the_others():
    models = [Either().double() for _ in range(M)]
    signs = torch.tensor([[1, -1, 1], [1, 1, 1], [-1, 1, 1], [1, -1, -1], [1, 1, 1], [-1, -1, 1]])  # step by model
    x = torch.randn(STEPS, M, B, 4).double().abs() * signs[..., None, None]
    batch = assert_as_alone(models, [(x[i], torch.randint(K, (M, B))) for i in range(STEPS)], each=True)
    assert batch.stacked_params["never.weight"].grad is None


def test_a_frozen_model_keeps_everything():
    models, pairs = models_of(Keeps), data()
    batch = ModelBatch(models, seeds=range(M))
    optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=RATES)
    way = Chunks(batch, 1)
    make_update(optimizer, way, *pairs[0], StepOptions(cross_entropy))
    before, drawn = copy.deepcopy(batch[1].state_dict()), batch.streams.on("cpu")[1].get_state()
    batch.freeze(1)
    for x, y in pairs[1:]:
        make_update(optimizer, way, x, y, StepOptions(cross_entropy))
    torch.testing.assert_close(batch[1].state_dict(), before, rtol=0, atol=0)
    assert torch.equal(batch.streams.on("cpu")[1].get_state(), drawn)
    train_alone(models[2], 2, pairs)
    torch.testing.assert_close(batch[2].state_dict(), models[2].state_dict(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss_fn", [lambda out, y: 1.0, lambda out, y: out.sum(0)])
def test_a_loss_that_is_none_is_refused(loss_fn):
    with pytest.raises((TypeError, ValueError), match=r"one loss a model|to be a tensor, got float"):
        Chunks(ModelBatch(models_of()), 1).backward(*data()[0], StepOptions(loss_fn))


def test_casts_of_weights_are_not_kept_over_an_update():
    """autocast keeps them for as long as it lasts, and here it lasts for the whole training."""
    models, pairs = [nn.Sequential(nn.Linear(4, 16), nn.Linear(16, K)) for _ in range(2)], data()
    batch = ModelBatch(models, seeds=range(2))
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.5)
    way = Chunks(batch, 1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [make_update(optimizer, way, x.float(), y, StepOptions(cross_entropy))[0] for x, y in pairs]
    for m, model in enumerate(models):
        alone = torch.optim.SGD(model.parameters(), lr=0.5)
        for (x, y), loss in zip(pairs, losses, strict=True):
            alone.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                expected = cross_entropy(model(x.float()), y)
            expected.backward()
            alone.step()
            assert torch.equal(loss[m], expected.detach())


def test_who_begins_to_look_on_sees_the_whole_batch():
    batch, seen = ModelBatch(models_of(), seeds=range(M)), []
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATES)
    steps = train_steps(batch, optimizer, data(), cross_entropy)
    next(steps)
    batch.stacked_params["out.bias"].register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    next(steps)
    batch.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    next(steps)
    assert seen == [(M, K), (M, B, K), (M, K)]


def test_off_the_main_thread_who_draws_meanwhile_changes_no_mask():
    """The main thread draws from torch's default generator all the time."""
    models, pairs = models_of(), data() * 5
    batch, done = ModelBatch(models, seeds=range(M)), []
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATES)
    train = threading.Thread(
        target=lambda: done.append(fit(batch, optimizer, pairs, cross_entropy, progress=False)), daemon=True
    )
    train.start()
    while train.is_alive():
        torch.rand(3)
    assert done[0].how == "all models at once"
    for m, model in enumerate(models):
        train_alone(model, m, pairs, cls=torch.optim.SGD)
        torch.testing.assert_close(batch[m].state_dict(), model.state_dict(), rtol=0, atol=1e-10)


def test_two_threads_do_not_take_turns_at_once_and_an_error_ends_them():
    batch, state = ModelBatch(models_of(), seeds=range(M)), torch.get_rng_state()
    taken = []

    def other() -> None:
        taken.append(GENERATOR.acquire(blocking=False))
        if taken[-1]:
            GENERATOR.release()

    def look() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    def cut_short() -> None:
        with batch.streams.take_turns(torch.device("cpu")) as turns:
            torch.rand(3 + next(turns))
            look()
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full") as error:
        cut_short()
    look()
    assert taken == [False, True]
    assert torch.equal(torch.get_rng_state(), state), error  # the error is held, and its frames with it


@pytest.mark.parametrize(("num_models", "how"), [(1, "one by one"), (2, "all models at once")])
def test_fit_trains_a_single_model_without_vmap_and_names_it(num_models, how):
    models, pairs = [nn.Linear(4, K).double() for _ in range(num_models)], data()
    batch = ModelBatch(models)
    rates = [RATES[m % M] for m in range(num_models)]
    optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=rates)
    history = fit(batch, optimizer, pairs, cross_entropy, progress=False)
    assert history.how == how
    for m, model in enumerate(models):
        train_alone(model, m, pairs)
        torch.testing.assert_close(batch[m].state_dict(), model.state_dict(), rtol=0, atol=1e-12)
