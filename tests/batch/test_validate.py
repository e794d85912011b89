"""What the models of a batch must share, and what a refusal says: the model, the place, got, expected, what to do."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Holds, assert_unchanged, hooked, local, local_lambda, snapshot
from torch import nn
from torch.nn import functional as F

from mbkit import ModelBatch

Make = Callable[[], nn.Module]


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
def linear(**kwargs: Any) -> Make:
    return lambda: nn.Linear(2, 2, **kwargs)


def within(make: Make) -> Make:
    return lambda: nn.Sequential(make())


def two(tied: bool) -> Make:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if tied:
            net[1].weight = net[0].weight
        return net

    return make


def named(*names: str) -> Make:
    def make() -> nn.Module:
        net = nn.Module()
        for name in names:
            setattr(net, name, nn.Linear(2, 2) if name == "a" else nn.ReLU())
        return net

    return make


def listening() -> nn.Module:
    net, heard = nn.Linear(3, 2), []
    net.register_forward_hook(lambda module, inputs, output: heard.append(output))
    return net


def conv(stride: int) -> Make:
    return lambda: nn.Conv2d(1, 1, 3, stride=stride)


IN_LAYERS: dict[str, tuple[Make, Make, str]] = {
    "class": (linear(), lambda: nn.Conv1d(2, 2, 1), r"is of another class: got .*conv\.Conv1d, expected .*ear\.Linear"),
    "layer": (within(nn.ReLU), within(nn.Tanh), r"has another layer at '0': got .*Tanh, expected .*ReLU"),
    "shape": (linear(), lambda: nn.Linear(2, 3), r"'weight' in another shape: got \[3, 2\], expected \[2, 2\]"),
    "bias": (linear(), linear(bias=False), r"other parameters or buffers \('bias' first\): got 1, expected 2"),
    "number of layers": (
        within(nn.ReLU),
        within(within(nn.ReLU)),
        r"submodules \('0.0' first\): got 3, expected 2",
    ),
    "order of layers": (named("a", "b"), named("b", "a"), "has other submodules .'their order' first."),
    "dtype": (
        linear(),
        linear(dtype=torch.float64),
        "'weight' as another dtype or on another device: got torch.float64 on cpu, expected torch.float32 on cpu",
    ),
    "device": (linear(), linear(device="meta"), "got torch.float32 on meta, expected"),
    "mode": (within(nn.ReLU), within(lambda: nn.ReLU().eval()), r"another mode at '0': got eval\(\), expected train"),
    "frozen": (
        linear(),
        lambda: linear()().requires_grad_(False),
        "'weight' frozen where another is not: got requires_grad=False, expected requires_grad=True",
    ),
    "tying": (two(False), two(True), r"shares other tensors between.*: got \['0.weight=1.weight'\], expected \[\]"),
    "whole numbers": (conv(1), conv(2), r"has another 'stride' at its top: got \(2, 2\), expected \(1, 1\)"),
    "a whole number": (lambda: nn.PixelShuffle(2), lambda: nn.PixelShuffle(3), "'upscale_factor' .* got 3, expected 2"),
    "a word": (nn.GELU, lambda: nn.GELU("tanh"), "has another 'approximate' at its top: got 'tanh', expected 'none'"),
    "momentum or none": (
        within(lambda: nn.BatchNorm1d(3)),
        within(lambda: nn.BatchNorm1d(3, momentum=None)),
        "has another 'momentum' at '0': got None, expected 0.1",
    ),
    "a class made twice": (lambda: local(0.1), lambda: local(0.2), "is of another class"),
    "a lambda's closure": (lambda: local_lambda(1.0), lambda: local_lambda(2.0), "has another 'act' at its top"),
    "an attribute more": (Holds, lambda: Holds(extra=1), "another 'extra' at its top: got 1, expected None"),
    "a number of hooks": (lambda: hooked(1), lambda: hooked(2), "has other forward hooks at its top"),
}


class Plain:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


leaky = functools.partial(functools.partial, F.leaky_relu)
ATTRIBUTES: dict[str, tuple[Any, Any, str]] = {
    "a type": (1, True, "got True, expected 1"),
    "a lambda": (lambda x: x + 1, lambda x: x - 1, "got <function"),
    "a lambda's default": (lambda x, scale=1.0: x * scale, lambda x, scale=2.0: x * scale, "got <function"),
    "a list": ([1, 2], [1, 3], r"got \[1, 3\], expected \[1, 2\]"),
    "a function": (F.relu, F.gelu, "got .*gelu"),
    "a partial": (leaky(negative_slope=0.1), leaky(negative_slope=0.7), "got .*leaky_relu>, negative_slope=0.7.*0.1"),
    "an object with tensors": (Plain(t=torch.ones(2)), Plain(t=torch.zeros(2)), "got <test_validate.Plain object"),
    "an array": (torch.ones(2).numpy(), torch.zeros(2).numpy(), "got array"),
    "an array's length": (torch.ones(2).numpy(), torch.ones(3).numpy(), "got array"),
    "a tensor's shape": (torch.ones(2), torch.ones(3), "got tensor"),
}
for name, (one, another, words) in ATTRIBUTES.items():
    text = f"another 'kept' at its top: {words}"
    IN_LAYERS[name] = functools.partial(Holds, kept=one), functools.partial(Holds, kept=another), text


@pytest.mark.parametrize("case", IN_LAYERS)
def test_models_that_differ_are_refused_by_name(case: str) -> None:
    make_one, make_another, text = IN_LAYERS[case]
    models = [make_one(), make_one(), make_another()]
    before = [snapshot(model) for model in models] if case != "device" else []
    with pytest.raises(ValueError, match=text) as caught:
        ModelBatch(models)
    assert caught.match(r"^Model 2 .*: got .*, expected .* as in model 0; the models of a batch must match\.$")
    for model, was in zip(models, before, strict=False):
        assert_unchanged(model, was)


# ------------------------------------------------------------------ what cannot be batched at all
class Outer(nn.Module):
    """A model in whose attribute `inner.kept` something stands."""

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.inner = Holds()
        self.inner.kept = make(self.inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def in_itself(kind: type) -> Any:
    made: Any = kind()
    if kind is list:
        made.append(made)
    elif kind is dict:
        made["below"] = [made]
    else:
        made.other = Plain(back=made)
    return made


def view_of_a_parameter() -> nn.Module:
    net = Holds()
    net.register_buffer("row", net.fc.weight.detach()[0])
    return net


def computed_from_a_parameter() -> nn.Module:
    net = Holds()
    net.twice = net.fc.weight * 2
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


def in_a_circle() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net[0].add_module("up", net)
    return net


ALONE: dict[str, tuple[Make, str]] = {
    "a script": (scripted, "the model is a ScriptModule, which torch.vmap cannot enter: pass the eager module"),
    "sparse gradients": (
        within(lambda: nn.Embedding(3, 2, sparse=True)),
        "module '0' asks for sparse gradients, which cannot be stacked: build it with sparse=False",
    ),
    "lazy layers": (
        within(lambda: nn.LazyLinear(2)),
        r"parameter '0\.weight' is not built yet: run each model once, then make the batch",
    ),
    "extra state": (lambda: Extra(3, 2), "keeps extra state outside tensors, which cannot be stacked: use buffers"),
    "a view of a parameter": (view_of_a_parameter, r"'(fc.weight|row)' and '(fc.weight|row)' share memory without"),
    "a tensor computed from a parameter": (
        computed_from_a_parameter,
        "the model keeps in 'twice' a tensor that carries the gradient of an earlier computation: compute it in",
    ),
    "a hook on a gradient": (with_late_hook, "parameter 'weight' has a hook"),
    "a module inside itself": (in_a_circle, r"got '0.up' of model 0, which is a module that contains it: keep"),
}
KEPT: list[tuple[Callable[[nn.Module], Any], str]] = [
    (lambda _: in_itself(list), "a list that contains itself: keep a copy"),
    (lambda _: in_itself(dict), "a dict that contains itself: keep a copy"),
    (lambda model: Plain(owner=model), "an object that refers to the model itself .* set the reference to None"),
    (lambda model: [Plain(deep=Plain(call=model.forward))], "an object that refers to the model itself"),
    (lambda model: functools.partial(torch.add, model.fc.weight), "a function that holds on to the model itself"),
    (lambda model: lambda x: x * model.fc.weight.sum(), "a function that holds on to the model itself"),
    (lambda model: Plain(call=lambda x: model.fc(x)), "a function that holds on to the model"),
    (lambda model: [torch.Generator()], "a torch.Generator, which the models would share: draw"),
]
for number, (make, words) in enumerate(KEPT):
    ALONE[f"kept {number}"] = functools.partial(Outer, make), f"'inner' keeps in 'kept' {words}"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", ALONE)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_batched_is_refused_at_construction(case: str, count: int) -> None:
    make, text = ALONE[case]
    with pytest.raises(ValueError, match=text):
        ModelBatch([make() for _ in range(count)])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (listening, "has other forward hooks at its top: .* with other values inside"),
        (
            lambda: Holds(hidden=[nn.Linear(3, 2)]),
            r"has another 'hidden' at its top: got \[Linear\(.*\)\] with other values inside, expected \[Linear",
        ),
    ],
)
def test_what_looks_alike_and_is_each_models_own_is_refused(make: Make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelBatch([make(), make()])


@pytest.mark.parametrize("wrap", [lambda batch: batch, nn.Sequential], ids=["itself", "inside"])
def test_a_batch_of_batches(wrap: Callable) -> None:
    batches = [wrap(ModelBatch([nn.Linear(3, 2) for _ in range(2)])) for _ in range(2)]
    with pytest.raises(TypeError, match=r"got a ModelBatch as .*model 0: take its models out first, \[\*batch\]"):
        ModelBatch(batches)


@pytest.mark.parametrize(
    "make", [lambda model: [model], lambda model: {"up": (model,)}, lambda _: in_itself(Plain), lambda _: [[1], [1]]]
)
def test_circles_that_a_copy_can_follow(make: Callable) -> None:
    models, x = [Outer(make) for _ in range(2)], torch.ones(1, 3)
    batch = ModelBatch(models)
    for m, model in enumerate(models):
        torch.testing.assert_close(batch(x)[m], model(x))
        torch.testing.assert_close(batch[m](x), model(x))


def test_buffers_may_share_memory_with_each_other() -> None:
    """Only what is trained in place would go different ways; tables are often cut from one."""

    def net() -> nn.Module:
        module, table = Holds(), torch.arange(6.0).view(3, 2)
        module.register_buffer("even", table[:, 0])
        module.register_buffer("odd", table[:, 1])
        return module

    assert torch.equal(ModelBatch([net(), net()]).stacked_buffers["odd"][1], torch.tensor([1.0, 3.0, 5.0]))
