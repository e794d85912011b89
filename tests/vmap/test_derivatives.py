"""Derivatives that models and losses take themselves: as alone, and with all models at once."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from exactness_cases import CASES
from exactness_check import SEEDS as LAYER_SEEDS
from exactness_check import build, inputs, loss_of
from oracle import assert_same_parameters, close, train_alone
from torch import nn
from torch.autograd import functional
from torch.autograd import grad as gradient
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.func import grad as func_grad
from torch.nn.functional import mse_loss

from mbkit import ModelBatch, OptimizerFactory, fit

KIND = {"dtype": torch.float64}
SEEDS = [11, 5, 2**40, 7]
RATE, STEPS, POINTS = 0.05, 3, 5
LAYERS = {
    name: case
    for name, case in CASES.items()
    if case.build.__module__ == "exactness_cases" and name != "Embedding(sparse)"
}

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch itself, for jvp


def tanh_net(inputs: int = 2, outputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, outputs))


def d(y, x, **options):
    return gradient(y, x, torch.ones_like(y), create_graph=True, **options)[0]


def burgers(u, x):
    first = d(u, x)
    return first[:, 1:] + u * first[:, :1] - 0.1 * d(first[:, :1], x)[:, :1]


class Net(nn.Module):
    """Calls `way(self, x)` on a small network."""

    def __init__(self, way, net=tanh_net) -> None:
        super().__init__()
        self.net, self.way = net(), way
        self.register_buffer("points", torch.linspace(0, 1, 2 * POINTS).view(POINTS, 2))

    def forward(self, x):
        return self.way(self, x)


def coordinates(self, x):
    z, t = x[:, :1].requires_grad_(), x[:, 1:].requires_grad_()
    u = self.net(torch.cat([z, t], 1))
    u_z = d(u, z)
    return d(u, t) + u * u_z - 0.1 * d(u_z, z)


def setter(self, x):
    x = x.detach()
    x.requires_grad = True
    return burgers(self.net(x), x) if x.is_leaf and x.requires_grad else x


def penalty(self, x):
    """Of a critic, between its inputs and others."""
    share = torch.rand(len(x), 1, dtype=x.dtype)
    between = (share * x + (1 - share) * x.flip(0)).requires_grad_()
    slope = gradient(self.net(between).sum(), between, create_graph=True, retain_graph=True)[0]
    return self.net(x) + (slope.norm(2, dim=1, keepdim=True) - 1) ** 2


def adapted(self, x):
    """MAML: two steps of the network's own on one half, then the other half."""
    fast = dict(self.net.named_parameters())
    for _ in range(2):
        loss = functional_call(self.net, fast, (x[:2],)).square().mean()
        steps = gradient(loss, list(fast.values()), create_graph=True)
        fast = {name: p - 0.1 * step for (name, p), step in zip(fast.items(), steps, strict=True)}
    return functional_call(self.net, fast, (x,))


def score(self, x):
    """Hyvarinen's score matching, with the trace of the second derivatives element by element."""
    x = x.clone().requires_grad_(True)
    s = gradient(self.net(x).sum(), x, create_graph=True)[0]
    trace = sum(gradient(s[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
    return (0.5 * s.square().sum(1) + trace)[:, None]


def sliced_score(self, x):
    x = x.clone().requires_grad_(True)
    direction = torch.randn_like(x)
    s = gradient(self.net(x).sum(), x, create_graph=True)[0]
    return (gradient((s * direction).sum(), x, create_graph=True)[0] * direction).sum(1, keepdim=True)


def forces(self, x):
    x.requires_grad_()
    energy = self.net(x).sum()
    with torch.enable_grad():
        return -gradient(energy, x, create_graph=self.training)[0]


def unused(self, x):
    x = x.clone().requires_grad_()
    u = self.net(x)
    none = gradient(u.sum(), [x, self.points.clone().requires_grad_()], create_graph=True, allow_unused=True)[1]
    zero = gradient(u.sum(), self.points.requires_grad_(), create_graph=True, materialize_grads=True)[0]
    return u + zero.sum() if none is None else x


def several_at_once(self, x):
    x = x.clone().requires_grad_()
    u = self.net(x)
    weights = torch.stack([torch.ones_like(u), u])
    return gradient(u, x, weights, create_graph=True, is_grads_batched=True)[0].sum(0)


def made_inside(self, x):
    t = torch.linspace(0, 1, len(x), dtype=x.dtype).unsqueeze(1).requires_grad_()
    return d(self.net(torch.cat([x[:, :1], t], 1)), t)


def one(self, z):
    return self.net(z)[0]


def laplacian(self, x):
    return vmap(lambda z: hessian(lambda z: one(self, z))(z).diagonal().sum())(x)[:, None]


FORWARD = {
    "coordinates": coordinates,
    "a copy": lambda self, x: burgers(self.net(x := x.clone().requires_grad_(True)), x),
    "the input itself": lambda self, x: burgers(self.net(x.requires_grad_()), x),
    "set as an attribute": setter,
    "points in a buffer": lambda self, x: burgers(self.net(p := self.points.clone().requires_grad_()), p) + x[:, :1],
    "made inside": made_inside,
    "gradient penalty": penalty,
    "MAML": adapted,
    "score matching": score,
    "sliced score matching": sliced_score,
    "forces": forces,
    "not used": unused,
    "several at once": several_at_once,
    "autograd.functional.jacobian": lambda self, x: functional.jacobian(
        lambda x: self.net(x).sum(0), x, create_graph=True
    )[0],
    "autograd.functional.hvp": lambda self, x: functional.hvp(
        lambda x: self.net(x).sum(), x, torch.ones_like(x), create_graph=True
    )[1],
    "func.grad": lambda self, x: func_grad(lambda x: self.net(x).sum())(x),
    "func.grad of weights": lambda self, x: (
        func_grad(lambda p: functional_call(self.net, p, (x,)).square().sum())(dict(self.net.named_parameters()))[
            "0.weight"
        ].sum()
        * x
    ),
    "func.hessian": laplacian,
    "func.jvp": lambda self, x: jvp(self.net, (x,), (torch.ones_like(x),))[1],
    "func.vjp": lambda self, x: vjp(self.net, x)[1](torch.ones(len(x), 1, dtype=x.dtype))[0],
    "func.jacfwd": lambda self, x: vmap(jacfwd(lambda z: one(self, z)))(x),
    "func.jacrev": lambda self, x: vmap(jacrev(lambda z: one(self, z)))(x),
    "func.vmap": lambda self, x: vmap(self.net)(x),
}


def with_inputs(self, x):
    x = x.clone().requires_grad_()
    return self.net(x), x


def critic(self, x):
    between = (x * torch.rand(len(x), 1, dtype=x.dtype)).requires_grad_()
    return self.net(x), self.net(between), between


def penalized(out, y):
    scores, between_scores, between = out
    return scores.mean() + (d(between_scores, between).norm(dim=1) - 1).square().mean()


def of_two(u, points):
    """Burgers' equation where the coordinates are two tensors, of which the input was made."""
    z, t = points
    u_z, u_t = gradient(u, (z, t), torch.ones_like(u), create_graph=True)
    return (u_t + u * u_z - 0.1 * d(u_z, z)).square().mean()


def conserved(u, x):
    """Derivatives of what depends on the points by two ways: through the model and at once."""
    return d(x[:, :1].exp() * d(u, x)[:, :1], x).square().mean()


def plain(self, x):
    return self.net(x)


def batches(own=False, count=1):
    lead = (count,) if own else ()
    return [(torch.rand(*lead, POINTS, 2, **KIND), torch.rand(*lead, POINTS, 1, **KIND)) for _ in range(STEPS)]


def tracked():
    """Points that are inputs and targets, so that the loss may differentiate with respect to them."""
    return [(x, x) for x in (x.requires_grad_() for x, _ in batches())]


def two_tracked():
    pairs = [(x[:, :1].clone().requires_grad_(), x[:, 1:].clone().requires_grad_()) for x, _ in batches()]
    return [(torch.cat(pair, 1), pair) for pair in pairs]


LOSSES = {
    "inputs returned": (with_inputs, lambda out, y: burgers(*out).square().mean(), batches),
    "shared inputs": (plain, lambda u, x: burgers(u, x).square().mean(), tracked),
    "shared tensors before the inputs": (plain, of_two, two_tracked),
    "by two ways": (plain, conserved, tracked),
    "gradient penalty": (critic, penalized, batches),
    "func.grad": (plain, lambda u, y: func_grad(lambda z: (z.sin() * y).sum())(u).mean(), batches),
    "func.vmap": (plain, lambda u, y: vmap(lambda a, b: (a - b).square().sum())(u, y).mean(), batches),
}


def loss(out, y):
    return mse_loss(out, y.expand_as(out))


def built(make, count):
    torch.manual_seed(3)
    return [make().double() for _ in range(count)]


def both(models, data, loss_fn, way, own=False):
    """Train models alone and in a batch; return the batch and the lone ones."""
    lone, seeds = copy.deepcopy(models), SEEDS[: len(models)]
    train_alone(lone, copy.deepcopy(data) if loss_fn is loss else data, own, loss_fn, seeds=seeds, configs={"lr": RATE})
    batch = ModelBatch(models, seeds=seeds, shared_input=not own)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATE)
    if way == "loop":
        for x, y in data:
            optimizer.zero_grad()
            batch.compute_loss(batch(x), y, loss_fn).backward()
            optimizer.step()
    else:
        fit(batch, optimizer, data, loss_fn, progress=False, **way)
    return batch, lone


WAYS = [("loop", 1), ("loop", 4), ({"chunk_size": None}, 2), ({"chunk_size": 2}, 4), ({}, 4)]
CELLS = [
    *((*cell, False) for cell in WAYS if cell[0] != {"chunk_size": 2}),
    ("loop", 4, True),
    ({"chunk_size": 2}, 4, True),
]


@pytest.mark.parametrize("name", FORWARD)
def test_derivatives_in_forward(name):
    """No warning says that a model runs model by model."""
    for way, count, own in CELLS:
        models = built(lambda: Net(FORWARD[name]), count)
        batch, lone = both(models, batches(own, count), loss, way, own)
        assert_same_parameters(list(batch), lone, 1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_in_the_loss(name):
    way_forward, loss_fn, data = LOSSES[name]
    for way, count in WAYS:
        batch, lone = both(built(lambda: Net(way_forward), count), data(), loss_fn, way)
        assert_same_parameters(list(batch), lone, 1e-11)


def test_points_that_nobody_hands_in():
    """Tensors of the surroundings become rows once derivatives with respect to them are asked for."""
    points = torch.rand(POINTS, 2, **KIND).requires_grad_()

    def way(self, x):
        return burgers(self.net(points), points) + x[:, :1]

    batch, lone = both(built(lambda: Net(way), 3), batches(), loss, "loop")
    assert_same_parameters(list(batch), lone, 1e-11)
    assert not batch.model_by_model


def test_points_that_the_loss_holds():
    """It meets them as rows of the models' inputs, and once more as what all models share."""
    (points, y), *_ = batches()
    points.requires_grad_()
    for way, count in WAYS:
        models = built(lambda: Net(plain), count)
        batch, lone = both(models, [(points, y)] * STEPS, lambda u, y: conserved(u, points), way)
        assert_same_parameters(list(batch), lone, 1e-11)


@pytest.mark.parametrize("name", ["coordinates", "gradient penalty", "MAML", "func.jvp"])
def test_frozen_models(name):
    models = built(lambda: Net(FORWARD[name]), 3)
    batch = ModelBatch(models, seeds=SEEDS[:3])
    batch.freeze(1)
    optimizer, data = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATE), batches()
    fit(batch, optimizer, data, loss, progress=False)
    lone = copy.deepcopy(models)
    train_alone([lone[0]], copy.deepcopy(data), False, loss, seeds=SEEDS[:1], configs={"lr": RATE})
    train_alone([lone[2]], copy.deepcopy(data), False, loss, seeds=SEEDS[2:3], configs={"lr": RATE})
    assert_same_parameters(list(batch), lone, 1e-11)


def test_without_gradients_around():
    def way(self, x):
        with torch.enable_grad():
            return burgers(self.net(x := x.clone().requires_grad_()), x)

    models, (x, _) = built(lambda: Net(way), 3), batches()[0]
    for points in (x, x.clone().requires_grad_()):
        with torch.no_grad():
            out = ModelBatch(models)(points)
        for m, model in enumerate(models):
            close(out[m], model(points), 1e-12, f"model {m}")


def test_a_step_that_is_compiled():
    models = built(lambda: Net(coordinates), 3)
    with mock.patch("torch._inductor.compile", lambda graph, *_, **__: graph):
        batch, lone = both(models, batches(), loss, {"compile": True})
    assert_same_parameters(list(batch), lone, 1e-11)


class Differentiated(nn.Module):
    """Returns a number made of the derivatives of a layer's outputs, in one of several ways."""

    def __init__(self, layer, how) -> None:
        super().__init__()
        self.scale, self.layer, self.how = nn.Parameter(1 + 0.1 * torch.rand(1)), layer, how

    def inner(self, *x):
        x = [t * self.scale if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in x]
        return loss_of(self.layer(*x))

    def forward(self, *x):
        return self.how(self, x, next(i for i, t in enumerate(x) if isinstance(t, torch.Tensor)))


def of_weights(self, x, i):
    found = gradient(self.inner(*x), list(self.parameters()), create_graph=True, allow_unused=True)
    return sum(g.square().sum() for g in found if g is not None)


def of_inputs(self, x, i):
    z = x[i].clone().requires_grad_()
    return gradient(self.inner(*x[:i], z, *x[i + 1 :]), z, create_graph=True)[0].square().sum()


def func_of_weights(self, x, i):
    own = dict(self.layer.named_parameters()) | {"scale": self.scale}

    def f(p):
        layer = {name: t for name, t in p.items() if name != "scale"}
        scaled = [t * p["scale"] if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in x]
        return loss_of(functional_call(self.layer, layer, tuple(scaled)))

    return sum(g.square().sum() for g in func_grad(f)(own).values())


def func_of_inputs(self, x, i):
    return func_grad(lambda z: self.inner(*x[:i], z, *x[i + 1 :]))(x[i]).square().sum()


def forward_of_inputs(self, x, i):
    return jvp(lambda z: self.inner(*x[:i], z, *x[i + 1 :]), (x[i],), (torch.ones_like(x[i]),))[1].square()


OFTEN = """Linear;Conv2d(groups);MaxPool2d;Embedding(padding_idx);LSTM;GRU;PReLU;PReLU per channel;LayerNorm;
    BatchNorm1d(track=False);InstanceNorm1d(affine);GroupNorm;CrossEntropyLoss""".replace("\n    ", " ").split(";")


@pytest.mark.parametrize("how", [of_weights, of_inputs, func_of_weights, func_of_inputs, forward_of_inputs])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in LAYERS]
)
@pytest.mark.filterwarnings("ignore")  # whatever layers warn of, alone and in a batch
def test_every_layer(name, how):
    """The gradient of its derivatives, and so its second ones."""
    for shared in (True, False):
        models = [Differentiated(model.double(), how).double() for model in build(LAYERS[name])]
        rows = [inputs(LAYERS[name], 0, 0 if shared else m, torch.float64) for m in range(len(models))]
        expected = []
        for model, seed, x in zip(models, LAYER_SEEDS, copy.deepcopy(rows), strict=True):
            torch.manual_seed(seed)
            try:
                expected.append(model(*x))
                expected[-1].backward()
            except (RuntimeError, ValueError):
                pytest.skip("no such derivative alone")
        batch = ModelBatch(models, seeds=LAYER_SEEDS, shared_input=shared)
        together = zip(*copy.deepcopy(rows), strict=True)
        columns = [torch.stack(column) if isinstance(column[0], torch.Tensor) else column[0] for column in together]
        out = batch(*(copy.deepcopy(rows[0]) if shared else columns))
        out.sum().backward()
        for m, model in enumerate(models):
            close(out[m], expected[m], 1e-10, f"model {m}")
            for (key, p), q in zip(batch.named_parameters(), model.parameters(), strict=True):
                got = torch.zeros_like(q) if p.grad is None else p.grad[m]
                close(got, torch.zeros_like(q) if q.grad is None else q.grad, 1e-10, f"gradient of {key} of model {m}")
