"""What has no end is refused by name, before it can recurse; hooks that keep what they see run for each model."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from mbkit import ModelBatch

X = torch.ones(1, 3)


class Holds(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.kept = make(self)

    def forward(self, x):
        return self.fc(x)


class Plain:
    def __init__(self, **held) -> None:
        vars(self).update(held)


def a_list(_):
    made = [1]
    made.append(made)
    return made


def a_dict(_):
    made = {}
    made["below"] = [made]
    return made


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_list, "'inner' keeps in 'kept' a list that contains itself: keep a copy"),
        (a_dict, "'inner' keeps in 'kept' a dict that contains itself: keep a copy"),
        (lambda model: Plain(owner=model), "an object that refers to the model itself .* set the reference to None"),
        (lambda model: [Plain(deep=Plain(call=model.forward))], "an object that refers to the model itself"),
        (lambda model: functools.partial(torch.add, model.fc.weight), "'kept' a function that holds on to the model"),
        (lambda model: Plain(call=lambda x: model.fc(x)), "'kept' a function that holds on to the model"),
        (lambda model: [torch.Generator()], "keeps in 'kept' a torch.Generator, which the models would share: draw"),
    ],
)
def test_attributes(make, words):
    with pytest.raises(ValueError, match=words):
        ModelBatch([Outer(make) for _ in range(2)])


class Outer(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.inner = Holds(make)

    def forward(self, x):
        return self.inner(x)


def an_object_in_a_circle(_):
    made = Plain()
    made.other = Plain(back=made)
    return made


@pytest.mark.parametrize(
    "make", [lambda model: [model], lambda model: {"up": (model,)}, an_object_in_a_circle, lambda _: [[1], [1]]]
)
def test_circles_that_a_copy_can_follow(make):
    models = [Holds(make) for _ in range(2)]
    batch = ModelBatch(models)
    for m, model in enumerate(models):
        assert torch.allclose(batch(X)[m], model(X), atol=1e-6)
        assert torch.allclose(batch[m](X), model(X), atol=1e-6)


def test_a_module_inside_itself():
    models = [nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)) for _ in range(2)]
    models[1][0].add_module("up", models[1])
    with pytest.raises(ValueError, match=r"got '0.up' of model 1, which is a module that contains it: keep"):
        ModelBatch(models)


@pytest.mark.parametrize("wrap", [lambda batch: batch, nn.Sequential], ids=["itself", "inside"])
def test_a_batch_of_batches(wrap):
    batches = [wrap(ModelBatch([nn.Linear(3, 2) for _ in range(2)])) for _ in range(2)]
    with pytest.raises(TypeError, match=r"got a ModelBatch as .*model 0: take its models out first, \[\*batch\]"):
        ModelBatch(batches)


class Recorder:
    def __init__(self) -> None:
        self.seen = []

    def __call__(self, module, inputs, output=None):
        self.seen.append(output if output is not None else inputs[0])

    def method(self, *args):
        self(*args)


KEPT: list[torch.Tensor] = []


def into_a_global(module, inputs, output):
    KEPT.append(output)


@pytest.mark.parametrize("way", ["closure", "object", "method", "pre", "global", "default"])
def test_hooks_that_keep_what_they_see(way):
    recorder = Recorder()
    seen = KEPT if way == "global" else recorder.seen
    seen.clear()
    hook = {
        "closure": lambda module, inputs, output: seen.append(output),
        "object": recorder,
        "method": recorder.method,
        "pre": recorder,
        "global": into_a_global,
        "default": lambda module, inputs, output, kept=seen: kept.append(output),
    }[way]
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(3)]
    for model in models:
        model[1].register_forward_pre_hook(hook) if way == "pre" else model[1].register_forward_hook(hook)
    batch = ModelBatch(models)
    with pytest.warns(
        UserWarning, match=r"'1' \(Linear\) runs model by model: .*its hooks are to see each model's own"
    ):
        batch(X)
    batch(X)
    got = list(seen)
    seen.clear()
    for model in models:
        model(X)
    assert len(got) == 6
    for m, expected in enumerate(seen):
        assert torch.allclose(got[m], expected, atol=1e-6)
        assert torch.allclose(got[3 + m], expected, atol=1e-6)


def test_hooks_that_keep_nothing_stay_fast():
    models = [nn.Linear(3, 2) for _ in range(2)]
    for model in models:
        model.register_forward_hook(lambda module, inputs, output: 2 * output)
    batch = ModelBatch(models)
    assert torch.allclose(batch(X)[1], models[1](X), atol=1e-6)
    assert batch.model_by_model == set()
