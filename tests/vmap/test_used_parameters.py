"""A parameter that only some models use in a step is for the others what it is alone: without a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_same_parameters
from torch import nn, optim

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.vmap import models_with_gradient

M, STEPS = 3, 8
OPTIMIZERS = [
    (optim.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    (optim.AdamW, {"lr": 0.05}),
    (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    (optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    (optim.Rprop, {"lr": 0.01}),  # on views
]


class Experts(nn.Module):
    """Each model's own activations choose which of two layers it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.left(x) if x.sum() > 0 else self.right(x)


class Skips(nn.Module):
    """Sometimes does without its input, so that no gradient reaches what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x + self.bias if x.sum() > 0 else self.bias.expand_as(x)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(3, 3), nn.ModuleList(nn.Linear(3, 2) for _ in range(2))

    def forward(self, x):
        return [head(self.body(x).tanh()) for head in self.heads]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.skips = nn.Linear(3, 3), Skips()

    def forward(self, x):
        h = self.first(x)
        return h + self.skips(h)


NETS = {
    "a layer chosen": lambda: nn.Sequential(nn.Linear(3, 3), Experts(), nn.Linear(3, 2)),
    "an input not used": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), Skips(), nn.Linear(3, 2)),
    "around it": lambda: nn.Sequential(Residual(), nn.Linear(3, 2)),
    "two heads": TwoHeads,
}


def loss_fn(outputs, y):
    """Of two heads it uses one, chosen by what they say."""
    if isinstance(outputs, list):
        outputs = outputs[0] if outputs[0].sum() > outputs[1].sum() else outputs[1]
    return nn.functional.mse_loss(outputs, y)


def data(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(5, n, dtype=torch.float64, generator=generator) for n in (3, 2)]


def train_alone(model, optimizer, used, *, halves=1, set_to_none=True):
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none)
        for half in range(halves):
            x, y = data(2 * step + half)
            loss_fn(model(x), y).backward()
        used.append([p.grad is not None for p in model.parameters()])
        optimizer.step()


PLAIN = (1, True, False)  # backward passes a step, zero_grad's set_to_none, the whole model run model by model
ROWS = [(optimizer, net, PLAIN) for optimizer in OPTIMIZERS for net in ("a layer chosen", "two heads")]
ROWS += [(OPTIMIZERS[0], net, PLAIN) for net in ("an input not used", "around it")]
ROWS += [(OPTIMIZERS[0], net, way) for net in NETS for way in ((2, True, False), (1, False, False), (1, True, True))]


@pytest.mark.filterwarnings("ignore:.*model by model")
@pytest.mark.parametrize(("optimizer", "net", "way"), ROWS)
def test_the_optimizer_leaves_it_as_alone(optimizer, net, way):
    (cls, numbers), (halves, set_to_none, whole) = optimizer, way
    torch.manual_seed(3)
    models = [NETS[net]().double() for _ in range(M)]
    batch = ModelBatch(models, model_by_model=[""] if whole else [])
    optimizer = OptimizerFactory(cls).create_optimizer(batch, **numbers)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none)
        for half in range(halves):
            x, y = data(2 * step + half)
            batch.compute_loss(batch(x), y, loss_fn).backward()
        optimizer.step()
    used = [[] for _ in range(M)]
    for m, model in enumerate(models):
        train_alone(model, cls(model.parameters(), **numbers), used[m], halves=halves, set_to_none=set_to_none)
    assert_same_parameters(list(batch), models, 1e-12)
    if halves == 1 and set_to_none and net != "around it":  # or the test would show nothing
        assert any(0 < sum(column) < M for rows in zip(*used, strict=True) for column in zip(*rows, strict=True))


def test_it_is_known_of_the_gradient_for_as_long_as_there_is_one():
    torch.manual_seed(3)
    batch = ModelBatch([Experts() for _ in range(2)], model_by_model=[""], shared_input=False)
    x = torch.tensor([[[1.0, 1, 1]], [[-1.0, -1, -1]]])

    def reached():
        found = [models_with_gradient(p.grad, 2) for p in (batch.left.weight, batch.right.weight)]
        return [None if models is None else models.tolist() for models in found]

    batch(x).sum().backward()
    assert reached() == [[True, False], [False, True]]
    batch.clip_grad_norm_(0.1)
    batch.zero_grad(set_to_none=False)
    assert reached() == [[True, False], [False, True]]
    batch(-x).sum().backward()  # added up, each model has used both
    assert reached() == [None, None]
    for p in batch.parameters():
        p.grad = None
    batch(-x).sum().backward()
    assert reached() == [[False, True], [True, False]]
    torch.autograd.grad(batch(x).sum(), list(batch.parameters()))  # touches no .grad
    assert reached() == [[False, True], [True, False]]


@pytest.mark.parametrize("slow", ["first", "second"])
def test_one_batch_behind_another(slow):
    """As a generator is trained through a discriminator."""
    nets = (
        {"first": nn.Linear, "second": lambda *_: Skips()}
        if slow == "second"
        else {"first": lambda *_: Skips(), "second": nn.Linear}
    )
    firsts, seconds = ([nets[name](3, 3).double() for _ in range(M)] for name in nets)
    first = ModelBatch(copy.deepcopy(firsts), model_by_model=[""] if slow == "first" else [])
    second = ModelBatch(copy.deepcopy(seconds), model_by_model=[""] if slow == "second" else [], shared_input=False)
    optimizers = [OptimizerFactory(optim.Adam).create_optimizer(b, lr=0.1, weight_decay=0.1) for b in (first, second)]
    alone = [
        optim.Adam([*a.parameters(), *b.parameters()], lr=0.1, weight_decay=0.1)
        for a, b in zip(firsts, seconds, strict=True)
    ]
    for step in range(STEPS):
        x, _ = data(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        second.compute_loss(second(first(x)), x, nn.functional.mse_loss).backward()
        for optimizer in optimizers:
            optimizer.step()
        for m in range(M):
            alone[m].zero_grad()
            nn.functional.mse_loss(seconds[m](firsts[m](x)), x).backward()
            alone[m].step()
    for batch, models in ((first, firsts), (second, seconds)):
        assert_same_parameters(list(batch), models, 1e-12)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("way", ["parameters", "outputs", "another loss", "another loss, zero"])
@pytest.mark.filterwarnings("ignore:.*model by model")
def test_other_ways_to_a_parameter_count_too(way, passes):
    """A loss that looks at its numbers uses one of two heads; something else uses both."""

    def both(outputs, y):
        return (0 if "zero" in way else 0.1) * sum(nn.functional.mse_loss(one, y) for one in outputs)

    def extra(model, outputs, y):
        if way == "parameters":
            return 0.1 * sum(p.square().sum() for p in model.parameters())
        if way == "outputs":
            return 0.1 * sum(one.square().sum() for one in outputs)
        return both(outputs, y)

    torch.manual_seed(3)
    models = [TwoHeads().double() for _ in range(M)]
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, lr=0.05, weight_decay=0.1)
    alone = [optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1) for model in models]
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        outputs = batch(x)
        losses = batch.compute_loss(outputs, y, loss_fn)
        more = batch.compute_loss(outputs, y, both) if "another" in way else extra(batch, outputs, y)
        if passes == 1:
            (losses + more).backward()
        else:
            losses.backward(retain_graph=True)
            more.backward()
        optimizer.step()
        for model, one in zip(models, alone, strict=True):
            one.zero_grad()
            outputs = model(x)
            (loss_fn(outputs, y) + extra(model, outputs, y)).backward()
            one.step()
    assert_same_parameters(list(batch), models, 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("net", ["a layer chosen", "two heads"])
@pytest.mark.filterwarnings("ignore:.*model by model")
def test_in_chunks(net, chunk_size):
    torch.manual_seed(3)
    models = [NETS[net]().double() for _ in range(M)]
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, lr=0.05, weight_decay=0.1)
    fit(batch, optimizer, [data(2 * step) for step in range(STEPS)], loss_fn, chunk_size=chunk_size, progress=False)
    for model in models:
        train_alone(model, optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1), [])
    assert_same_parameters(list(batch), models, 1e-12)
