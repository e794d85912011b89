"""Convolutions that are folded into one, and what follows them: each model is the lone one, and all run at once."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mbkit import ModelBatch
from mbkit.vmap.rules import convolution

M, B, K = 3, 4, 5
kept: list[Tensor] = []  # what `keep` has seen; the batch reads it off


class Net(nn.Module):
    """Two convolutions, and between them what is to be tried: it gets the net and `[B, 6, 10, 10]`."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 3), between
        self.last = nn.LazyLinear(K)

    def forward(self, x: Tensor) -> Any:
        between = self.between(self, self.first(x))
        more = between[1:] if isinstance(between, tuple) else ()
        h = self.second(between[0] if more else between)
        out = self.last(F.max_pool2d(h.relu(), 2).flatten(1))
        return (out, *more) if more else out


@pytest.fixture(autouse=True, scope="module")
def fold_double_precision():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "FOLDED_DTYPES", {torch.float64})
        yield


def both(between: Any) -> tuple[ModelBatch, list[nn.Module], Tensor, Any, list[Any]]:
    """Return a batch, the models alone, their input, and what the two sides have returned."""
    torch.manual_seed(0)
    x = torch.randn(B, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    models = [Net(between).double() for _ in range(M)]
    for model in models:
        model(x)  # makes the lazy layer
    return both_sides(models, x)


def both_sides(models: list[nn.Module], x: Tensor) -> tuple[ModelBatch, list[nn.Module], Tensor, Any, list[Any]]:
    batch = ModelBatch(copy.deepcopy(models), seeds=range(M))
    outputs, alone = batch(x), []
    for m, model in enumerate(models):
        torch.manual_seed(m)
        alone.append(model(x))
    return batch, models, x, outputs, alone


def assert_same(batch: ModelBatch, models: list[nn.Module], x: Tensor, losses: Tensor, alone: list[Tensor]) -> None:
    """Compare the losses, and the gradients of the parameters and of the input."""
    close(losses.detach(), torch.stack(alone).detach())
    (of_x,) = torch.autograd.grad(sum(alone), x, retain_graph=True)
    close(torch.autograd.grad(losses.sum(), x, retain_graph=True)[0], of_x, what="the input's gradient")
    losses.sum().backward()
    for loss, model in zip(alone, models, strict=True):
        loss.backward(inputs=list(model.parameters()))
    for name, stack in batch.stacked_params.items():
        close(stack.grad, torch.stack([dict(model.named_parameters())[name].grad for model in models]), what=name)


def pooled_twice(net: Net, h: Tensor) -> Tensor:
    h = h.relu()
    return F.max_pool2d(h, 2) + F.max_pool2d(h, 2, ceil_mode=True)


def also_averaged(net: Net, h: Tensor) -> Tensor:
    h = h.relu()
    return F.max_pool2d(h, 2) + F.avg_pool2d(h, 2)


def edited_after(net: Net, h: Tensor) -> Tensor:
    h = F.max_pool2d(h.relu(), 2)
    h += 0.5
    return h.mul_(2)


def differentiated(net: Net, h: Tensor) -> Tensor:
    """Takes a derivative by the ReLU's output, which is not zero where the ReLU stops it."""
    h = (h - 0.3).relu()
    pooled = F.max_pool2d(h, 2)
    (slope,) = torch.autograd.grad((pooled + 1).pow(2).sum(), h, create_graph=True)
    return pooled + slope.mean((1, 2, 3), keepdim=True)


def penalized(net: Net, h: Tensor) -> Tensor:
    """Takes a derivative by a weight, through ReLU and pooling."""
    h = F.max_pool2d(h.relu(), 2)
    (slope,) = torch.autograd.grad(h.pow(2).sum(), net.first.weight, create_graph=True)
    return h + slope.pow(2).mean()


def not_a_number(net: Net, h: Tensor) -> Tensor:
    """Has a NaN in one window, which pooling takes for the largest number."""
    broken = torch.zeros_like(h[0])
    broken[0, 3, 3] = torch.nan
    return F.max_pool2d((h - broken).relu(), 2).nan_to_num()


def noise_in_place(net: Net, h: Tensor) -> Tensor:
    return h + torch.empty_like(h).normal_() + h.detach().clone().uniform_()


# What stands between two convolutions -> over how many numbers a ReLU's gradient is stopped, of one model's 2,400
# before the pooling and its 600 after it.
WAYS = {
    "pooled": (lambda net, h: F.max_pool2d(h.relu(), 2), 600),
    "pooled by modules": (lambda net, h: nn.MaxPool2d(2, 2)(nn.ReLU()(h)), 600),
    "windows overlap": (lambda net, h: F.max_pool2d(h.relu(), (3, 2), 2, (1, 0)), 600),
    "all below zero": (lambda net, h: F.max_pool2d((h - 9).relu(), 2), 600),
    "pooled first": (lambda net, h: F.max_pool2d(h, 2).relu(), 600),
    "averaged": (lambda net, h: F.avg_pool2d(h.relu(), 2), 2400),
    "pooled twice": (pooled_twice, 2 * 600 + 2400),
    "also averaged": (also_averaged, 600 + 2400),
    "not a number": (not_a_number, 600),
    "edited after": (edited_after, 600),
    "penalized": (penalized, None),
    "differentiated": (differentiated, None),
    "ReLU in place": (lambda net, h: F.max_pool2d(h.relu_(), 2), None),
    "residual in place": (lambda net, h: h.add_(h.detach()).clamp_(-1, 1), None),
    "a part in place": (lambda net, h: h[:, :2].mul_(2).sum() + h, None),
}


# What is a view of `[B, 6, 10, 10]` alone -> whether a batch without folding has to copy it.
ALIASES = {
    "flatten": (lambda h: h.flatten(2), False),
    "flatten of a part": (lambda h: h[:, :3].flatten(1), False),
    "reshape": (lambda h: h.reshape(len(h), -1), False),
    "view": (lambda h: h.view(len(h), -1), False),
    "contiguous": (Tensor.contiguous, True),
    "contiguous of a part": (lambda h: h[:1, :3].contiguous(), False),
    "ravel": (torch.ravel, True),
    "to": (lambda h: h.to(memory_format=torch.contiguous_format), False),
    "flatten of channels last": (lambda h: h.permute(0, 2, 3, 1).flatten(1, 2), False),
    "unflatten": (lambda h: h.unflatten(1, (2, 3)), False),
    "strides": (lambda h: h.as_strided((len(h), 50), (600, 2), 1), True),
}


class Stopped(TorchDispatchMode):
    """Counts the numbers that ReLUs' gradients are stopped at, of more than one layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten.threshold_backward.default and args[0].shape[-1] in (5, 10):
            self.numbers += args[0].numel()
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("way", WAYS)
def test_as_alone_and_at_once(way):
    between, stopped = WAYS[way]
    batch, models, x, outputs, alone = both(between)
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])
    if stopped is not None:
        with Stopped() as seen:
            batch(x).sum().backward()
        assert seen.numbers == stopped * M


# What stands between two convolutions -> whether they stay folded.
ORDERS = {
    "dropout": (lambda net, h: F.dropout(F.max_pool2d(h.relu(), 2), 0.3), True),
    "dropout of features": (lambda net, h: F.dropout2d(h, 0.3), True),
    "dropout in place": (lambda net, h: F.dropout2d(F.dropout(h, 0.3, inplace=True), inplace=True), True),
    "in turn": (lambda net, h: F.alpha_dropout(h, 0.3, training=True), False),
    "noise": (lambda net, h: h + torch.rand_like(h), True),
    "noise in place": (noise_in_place, True),
    "noise for a part": (lambda net, h: h * torch.rand_like(h[:, :, 1:, :1]).mean(), False),
    "group norm": (lambda net, h: F.group_norm(h, 2), False),
    "pooled to one, edited": (lambda net, h: h * F.adaptive_avg_pool2d(h, 1).flatten(1).mul_(2)[..., None, None], True),
    "strides": (lambda net, h: h * h.stride(2) + h.is_contiguous(), True),
    "strides of a view": (lambda net, h: h * h.permute(0, 2, 3, 1).stride(1) + h.mT.is_contiguous(), False),
    "a question about a format": (lambda net, h: h + h.is_contiguous(memory_format=torch.channels_last), True),
    "flattened, edited": (lambda net, h: h.flatten(1).mul_(2).sum() + h, False),
}


@pytest.mark.parametrize("way", ORDERS)
def test_memory_order_as_alone(way):
    between, folds = ORDERS[way]
    batch, models, x, outputs, alone = both(between)
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])
    assert batch._context.folding == folds


@pytest.mark.parametrize(
    ("last", "images"),
    [("", 1), ("model", 1), ("input and model", 1), ("input", B), ("model", B), ("input and model", B)],
)
def test_channels_last_and_one_image(last, images):
    torch.manual_seed(0)
    x = torch.randn(images, 3, 12, 12, dtype=torch.float64)
    models = [
        nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.Dropout(0.3),
            nn.Conv2d(6, 8, 3),
            nn.GroupNorm(2, 8) if last == "model" else nn.BatchNorm2d(8),
            nn.Dropout(0.3 if images > 1 else 0.0),  # without it, a gradient of another layout arrives
            nn.Flatten(),
            nn.Linear(512, K),
        ).double()
        for _ in range(M)
    ]
    if "input" in last:
        x = x.to(memory_format=torch.channels_last)
    if "model" in last:
        models = [model.to(memory_format=torch.channels_last) for model in models]
    batch, models, x, outputs, alone = both_sides(models, x.requires_grad_())
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])


def test_one_image():
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K)
    layers = nn.Conv2d(3, 8, (1, 5), padding=(0, 2)), nn.ReLU(), nn.Conv2d(8, 8, (5, 1), (2, 1), (2, 0)), *head
    models = [copy.deepcopy(nn.Sequential(*layers)).double() for _ in range(M)]
    batch, models, x, outputs, alone = both_sides(models, x)
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("edits_view", [True, False])
@pytest.mark.parametrize("alias", ALIASES)
def test_edits_of_what_is_a_view_alone(alias, edits_view, folds, monkeypatch):
    view, copied = ALIASES[alias]
    if not folds:
        monkeypatch.setattr(convolution, "FOLDED_DTYPES", set())

    def between(net: Net, h: Tensor) -> Tensor:
        seen = view(h)
        (seen if edits_view else h).mul_(2)
        return F.max_pool2d(h, 2) + seen.sum()

    with warnings.catch_warnings():
        if copied:
            warnings.filterwarnings("ignore", "The whole model runs model by model")
        batch, models, x, outputs, alone = both(between)
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])


def keep(net: Net, h: Tensor) -> Tensor:
    h = (h - 0.3).relu()
    kept.append(h)
    return F.max_pool2d(h, 2)


def test_gradient_of_what_a_model_has_kept():
    kept.clear()
    batch, models, x, outputs, alone = both(keep)
    seen = kept[-1 - M :]
    expected = [torch.autograd.grad(out.sum(), h, retain_graph=True)[0] for out, h in zip(alone, seen[1:], strict=True)]
    close(torch.autograd.grad(outputs.sum(), seen[0], retain_graph=True)[0], torch.stack(expected))
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])


def returned(net: Net, h: Tensor) -> tuple[Tensor, Tensor]:
    h = h.relu()
    return F.max_pool2d(h, 2), h


def test_gradient_of_activations_that_a_model_returns():
    batch, models, x, (outputs, h), alone = both(returned)
    of_h = [torch.autograd.grad(out.sum(), own, retain_graph=True)[0] for out, own in alone]
    close(torch.autograd.grad(outputs.sum(), h, retain_graph=True)[0], torch.stack(of_h))
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out, _ in alone])


def test_gradient_in_part_from_elsewhere():
    """Of two backward passes over one graph the second does not come through the pooling."""

    def between(net: Net, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h.relu()
        return F.max_pool2d(h, 2), h.mean((1, 2, 3)) + h.std()

    batch, models, _, (outputs, extra), alone = both(between)
    for mine, lone in ((outputs, 0), (extra, 1)):
        expected = [
            torch.autograd.grad(own[lone].sum(), m.first.weight, retain_graph=True)[0]
            for own, m in zip(alone, models, strict=True)
        ]
        (got,) = torch.autograd.grad(mine.sum(), batch.stacked_params["first.weight"], retain_graph=True)
        close(got, torch.stack(expected))


class Keeps(nn.Module):
    """Lays images out anew, in a layer of its own."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, h: Tensor) -> Tensor:
        return self.change(h)


LAST = {"memory_format": torch.channels_last}
# Where images or weights become channels_last, in which vmap may not keep them.
CHANGES = {
    "model": lambda model: model.to(**LAST),
    "to": lambda model: Keeps(lambda h: h.to(**LAST)),
    "contiguous": lambda model: Keeps(lambda h: h.contiguous(**LAST)),
    "empty": lambda model: Keeps(lambda h: torch.empty_like(h, **LAST).copy_(h)),
    "turned": lambda model: Keeps(lambda h: h.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
}


@pytest.mark.filterwarnings("ignore:.* runs model by model")
@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("images", [1, B])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_masks_of_what_becomes_channels_last(change, where, images, folds, monkeypatch):
    if not folds:
        monkeypatch.setattr(convolution, "FOLDED_DTYPES", set())
    torch.manual_seed(0)
    models = []
    for _ in range(M):
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.3), nn.Conv2d(6, 8, 3), nn.Dropout(0.3)]
        changed = CHANGES[change](nn.Sequential(*layers))
        layers.insert(where, changed if isinstance(changed, Keeps) else nn.Identity())
        models.append(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, K)).double())
    x = torch.randn(images, 3, 12, 12, dtype=torch.float64).requires_grad_()
    batch, models, x, outputs, alone = both_sides(models, x)
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])


@pytest.mark.parametrize("folds", [True, False])
def test_masks_of_whole_features_and_images_have_one_order(folds, monkeypatch):
    if not folds:
        monkeypatch.setattr(convolution, "FOLDED_DTYPES", set())
    torch.manual_seed(0)
    depth = Keeps(lambda h: h * h.new_empty(len(h), 1, 1, 1).bernoulli_(0.7))
    squeeze = Keeps(lambda h: h * F.dropout(F.adaptive_avg_pool2d(h, 1), 0.3))
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout2d(0.3), depth, squeeze, nn.Flatten(), nn.Linear(600, K)]
    models = [copy.deepcopy(nn.Sequential(*layers)).double().to(**LAST) for _ in range(M)]
    x = torch.randn(B, 3, 12, 12, dtype=torch.float64).requires_grad_()
    batch, models, x, outputs, alone = both_sides(models, x)
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])
    assert not batch._context.model_by_model


@pytest.mark.filterwarnings("ignore:.* runs model by model")
@pytest.mark.parametrize("edits_view", [True, False])
@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), Keeps(lambda h: h.mul_(2 if h.sum() > -1e9 else 1))])
def test_a_layer_that_edits_what_is_a_view_alone(layer, edits_view):
    def between(net: Net, h: Tensor) -> Tensor:
        seen = h.contiguous()
        layer(seen if edits_view else h)
        return h + seen.sum()

    batch, models, x, outputs, alone = both(between)
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])


# Steps of a drawn network, each from `[B, 6, H, W]` to the like.
STEPS = {
    "relu": lambda net, h: h.relu(),
    "shifted relu": lambda net, h: (h - 0.2).relu(),
    "tanh": lambda net, h: h.tanh(),
    "pool": lambda net, h: F.max_pool2d(h, 2) if h.shape[-1] > 8 else h,
    "pool, overlapping": lambda net, h: F.max_pool2d(h, 3, 1, 1),
    "average": lambda net, h: F.avg_pool2d(h, 3, 1, 1),
    "convolve": lambda net, h: F.conv2d(h, net.second.weight[:6], padding=1),
    "normalize": lambda net, h: F.batch_norm(h, None, None, training=True),
    "drop": lambda net, h: F.dropout(h, 0.3),
    "flatten": lambda net, h: h.flatten(1).view(h.shape),
    "turn": lambda net, h: h.mT,
    "contiguous": lambda net, h: h.contiguous(),
    "channels last": lambda net, h: h.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "roll": lambda net, h: h.roll(1, 1),
    "scale in place": lambda net, h: h.mul_(1.5),
    "relu in place": lambda net, h: h.relu_(),
    "a part in place": lambda net, h: h[:, :2].add_(0.5).mean() + h,
}


@pytest.mark.filterwarnings("ignore:The whole model runs model by model")
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 2)), min_size=2, max_size=6))
def test_drawn_networks(steps):
    """Each step takes one of the three latest results; the last one goes on, with a share of the one before."""

    def between(net: Net, h: Tensor) -> Tensor:
        made = [h]
        for name, back in steps:
            made.append(STEPS[name](net, made[-1 - min(back, len(made) - 1)]))
        return made[-1] + made[-2].mean()

    try:
        batch, models, x, outputs, alone = both(between)
        torch.autograd.grad(sum(out.sum() for out in alone), x, retain_graph=True)
    except RuntimeError as error:
        assume("inplace operation" not in str(error))  # alone it cannot be trained
        raise
    assert_same(batch, models, x, outputs.pow(2).sum((1, 2)), [out.pow(2).sum() for out in alone])
