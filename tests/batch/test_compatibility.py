"""What the models of a batch must share, and what a refusal says: the model, the place, got, expected, what to do."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Config, Holds, assert_unchanged, hooked, local, local_lambda, snapshot
from torch import nn
from torch.nn import functional as F

from mbkit import ModelBatch


# ------------------------------------------------------------------ no list of models
@pytest.mark.parametrize(
    ("models", "kind", "text"),
    [
        ([], ValueError, r"Expected at least one model, got an empty list: pass \[model_0, model_1, …\]"),
        (iter(()), ValueError, "Expected at least one model, got an empty list"),
        (None, TypeError, r"Expected a list of models, got None: pass \[model_0, model_1, …\]"),
        (3, TypeError, "Expected a list of models, got 3"),
        (nn.Linear(2, 2), TypeError, "Expected a list of models, got one Linear"),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), TypeError, "Expected a list of models, got one Sequential"),
        ([nn.Linear, nn.Linear], TypeError, "Expected nn.Modules, got type as model 0: pass the models themselves"),
        ([nn.ReLU(), F.relu], TypeError, "Expected nn.Modules, got function as model 1"),
        ("ab", TypeError, "Expected nn.Modules, got str as model 0"),
        ([nn.Linear(2, 2)] * 2, ValueError, r"got the same object twice: build each, or copy\.deepcopy it"),
    ],
)
def test_what_is_no_list_of_models(models: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        ModelBatch(models)


# ------------------------------------------------------------------ models that differ
def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def listening() -> nn.Module:
    net, heard = nn.Linear(3, 2), []
    net.register_forward_hook(lambda module, inputs, output: heard.append(output))
    return net


def reordered() -> nn.Module:
    net = nn.Module()
    net.b, net.a = nn.ReLU(), nn.Linear(2, 2)
    return net


def ordered() -> nn.Module:
    net = nn.Module()
    net.a, net.b = nn.Linear(2, 2), nn.ReLU()
    return net


def no_grad(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False)


Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]
DIFFER: dict[str, Pair] = {
    "class": (
        lambda: nn.Linear(2, 2),
        lambda: nn.Conv1d(2, 2, 1),
        r"is of another class: got .*conv\.Conv1d, expected .*linear\.Linear as in model 0; the models of a batch must",
    ),
    "layer": (
        lambda: nn.Sequential(nn.ReLU()),
        lambda: nn.Sequential(nn.Tanh()),
        r"has another layer at '0': got .*Tanh, expected .*ReLU",
    ),
    "shape": (
        lambda: nn.Linear(2, 2),
        lambda: nn.Linear(2, 3),
        r"'weight' in another shape: got \[3, 2\], expected \[2, 2\]",
    ),
    "bias": (
        lambda: nn.Linear(2, 2),
        lambda: nn.Linear(2, 2, bias=False),
        r"other parameters or buffers \('bias' first\): got 1, expected 2",
    ),
    "number of layers": (
        lambda: nn.Sequential(nn.ReLU()),
        lambda: nn.Sequential(nn.ReLU(), nn.ReLU()),
        r"has other submodules \('1' first\): got 3, expected 2",
    ),
    "order of layers": (ordered, reordered, "has other submodules .'their order' first."),
    "dtype": (
        lambda: nn.Linear(2, 2),
        lambda: nn.Linear(2, 2).double(),
        "'weight' as another dtype or on another device: got torch.float64 on cpu, expected torch.float32 on cpu",
    ),
    "device": (lambda: nn.Linear(2, 2), lambda: nn.Linear(2, 2, device="meta"), "got torch.float32 on meta, expected"),
    "mode": (
        lambda: nn.Sequential(nn.ReLU()),
        lambda: nn.Sequential(nn.ReLU().eval()),
        r"is in another mode at '0': got eval\(\), expected train\(\)",
    ),
    "frozen": (
        lambda: nn.Linear(2, 2),
        lambda: no_grad(nn.Linear(2, 2)),
        "'weight' frozen where another is not: got requires_grad=False, expected requires_grad=True",
    ),
    "tying": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
        tied,
        r"shares other tensors between its layers: got \['0.weight=1.weight'\], expected \[\]",
    ),
    "a whole number of torch's": (
        lambda: nn.Conv2d(1, 1, 3),
        lambda: nn.Conv2d(1, 1, 3, stride=2),
        r"has another 'stride' at its top: got \(2, 2\), expected \(1, 1\)",
    ),
    "another whole number of torch's": (
        lambda: nn.PixelShuffle(2),
        lambda: nn.PixelShuffle(3),
        "has another 'upscale_factor' at its top: got 3, expected 2",
    ),
    "a type": (lambda: Holds(deep=1), lambda: Holds(deep=True), "another 'deep' at its top: got True, expected 1"),
    "a lambda": (lambda: Holds(act=lambda x: x + 1), lambda: Holds(act=lambda x: x - 1), "has another 'act'"),
    "a word of torch's": (
        lambda: nn.GELU(),
        lambda: nn.GELU(approximate="tanh"),
        "has another 'approximate' at its top: got 'tanh', expected 'none'",
    ),
    "momentum or none": (
        lambda: nn.Sequential(nn.BatchNorm1d(3)),
        lambda: nn.Sequential(nn.BatchNorm1d(3, momentum=None)),
        "has another 'momentum' at '0': got None, expected 0.1",
    ),
    "a number of the user's": (
        lambda: Holds(depth=1.5),
        lambda: Holds(depth=2.5),
        "another 'depth' at its top: got 2.5",
    ),
    "an attribute more": (lambda: Holds(), lambda: Holds(extra=1), "another 'extra' at its top: got 1, expected None"),
    "a list": (lambda: Holds(sizes=[1, 2]), lambda: Holds(sizes=[1, 3]), r"'sizes' at its top: got \[1, 3\], expected"),
    "a function": (lambda: Holds(act=F.relu), lambda: Holds(act=F.gelu), "another 'act' at its top: got .*gelu"),
    "a partial": (
        lambda: Holds(act=functools.partial(F.leaky_relu, negative_slope=0.1)),
        lambda: Holds(act=functools.partial(F.leaky_relu, negative_slope=0.7)),
        r"got functools\.partial\(<function leaky_relu>, negative_slope=0\.7\), expected .*0\.1",
    ),
    "a lambda's closure": (lambda: local_lambda(1.0), lambda: local_lambda(2.0), "has another 'act' at its top"),
    "a lambda's default": (lambda: default_lambda(1.0), lambda: default_lambda(2.0), "has another 'act' at its top"),
    "a class made twice, differently": (lambda: local(0.1), lambda: local(0.2), "is of another class"),
    "an object": (lambda: Holds(cfg=Config(1)), lambda: Holds(cfg=Config(2)), "has another 'cfg' at its top"),
    "a generator": (
        lambda: Holds(rng=torch.Generator().manual_seed(1)),
        lambda: Holds(rng=torch.Generator().manual_seed(2)),
        "Generator",
    ),
    "an array": (lambda: Holds(a=torch.ones(2).numpy()), lambda: Holds(a=torch.zeros(2).numpy()), "has another 'a'"),
    "an array's length": (
        lambda: Holds(a=torch.ones(2).numpy()),
        lambda: Holds(a=torch.ones(3).numpy()),
        "another 'a'",
    ),
    "a tensor's shape": (lambda: Holds(t=torch.ones(2)), lambda: Holds(t=torch.ones(3)), "has another 't' at its top"),
    "layers in a list": (
        lambda: Holds(hidden=[nn.Linear(3, 2)]),
        lambda: Holds(hidden=[nn.Linear(3, 2)]),
        r"has another 'hidden' at its top: got \[Linear\(.*\)\] with other values inside, expected \[Linear",
    ),
    "a number of hooks": (lambda: hooked(1), lambda: hooked(2), "has other forward hooks at its top"),
    "hooks that keep something": (
        listening,
        listening,
        "has other forward hooks at its top: .* with other values inside",
    ),
}


DIFFER_EACH = ("layers in a list", "hooks that keep something", "a generator")  # or are refused for themselves


def default_lambda(scale: float) -> nn.Module:
    return Holds(act=lambda x, scale=scale: x * scale)


@pytest.mark.parametrize("case", DIFFER)
def test_models_that_differ_are_refused_by_name(case: str) -> None:
    make_one, make_another, text = DIFFER[case]
    models = [make_one(), make_another()]
    before = [snapshot(model) for model in models] if case != "device" else []
    with pytest.raises(ValueError, match=text):
        ModelBatch(models)
    for model, was in zip(models, before, strict=False):
        assert_unchanged(model, was)


@pytest.mark.parametrize("case", [name for name in DIFFER if name not in DIFFER_EACH])
def test_the_refusal_names_the_model(case: str) -> None:
    make_one, make_another, _ = DIFFER[case]
    with pytest.raises(
        ValueError, match=r"^Model 2 .*: got .*, expected .* as in model 0; the models of a batch must match"
    ):
        ModelBatch([make_one(), make_one(), make_another()])


# ------------------------------------------------------------------ what cannot be batched at all
def view_of_a_parameter() -> nn.Module:
    net = Holds()
    net.register_buffer("row", net.fc.weight.detach()[0])
    return net


def computed_from_a_parameter() -> nn.Module:
    net = Holds()
    net.twice = net.fc.weight * 2
    return net


def lambda_over_self() -> nn.Module:
    net = Holds()
    net.act = lambda x: x * net.fc.weight.sum()
    return net


class Extra(nn.Linear):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None:
        pass


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        return torch.jit.script(nn.Linear(3, 2))


def with_late_hook() -> nn.Module:
    net = nn.Linear(3, 2)
    net.weight.register_post_accumulate_grad_hook(lambda p: None)
    return net


ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a script": (scripted, "the model is a ScriptModule, which torch.vmap cannot enter: pass the eager module"),
    "sparse gradients": (
        lambda: nn.Sequential(nn.Embedding(3, 2, sparse=True)),
        "module '0' asks for sparse gradients, which cannot be stacked: build it with sparse=False",
    ),
    "lazy layers": (
        lambda: nn.Sequential(nn.LazyLinear(2)),
        r"parameter '0\.weight' is not built yet: run each model once, then make the batch",
    ),
    "extra state": (lambda: Extra(3, 2), "keeps extra state outside tensors, which cannot be stacked: use buffers"),
    "a view of a parameter": (
        view_of_a_parameter,
        r"'(fc.weight|row)' and '(fc.weight|row)' share memory without being",
    ),
    "a tensor computed from a parameter": (
        computed_from_a_parameter,
        "the model keeps in 'twice' a tensor that carries the gradient of an earlier computation: compute it in",
    ),
    "a lambda over the model": (lambda_over_self, "keeps in 'act' a function that holds on to the model itself"),
    "a hook on a gradient": (with_late_hook, "parameter 'weight' has a hook"),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", ALONE)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_batched_is_refused_at_construction(case: str, count: int) -> None:
    make, text = ALONE[case]
    with pytest.raises(ValueError, match=text):
        ModelBatch([make() for _ in range(count)])


def test_buffers_may_share_memory_with_each_other() -> None:
    """Only what is trained in place would go different ways; tables are often cut from one."""

    def net() -> nn.Module:
        module, table = Holds(), torch.arange(6.0).view(3, 2)
        module.register_buffer("even", table[:, 0])
        module.register_buffer("odd", table[:, 1])
        return module

    assert torch.equal(ModelBatch([net(), net()]).stacked_buffers["odd"][1], torch.tensor([1.0, 3.0, 5.0]))
