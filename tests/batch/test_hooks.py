"""Forward hooks that keep what they see run for each model by itself; those that keep nothing stay fast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mbkit import ModelBatch

X = torch.ones(1, 3)


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
