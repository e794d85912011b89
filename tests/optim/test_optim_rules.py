"""Every update rule, every hyperparameter per model, against M lone runs of torch.optim's for-loop implementation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from optimizers import SHAPES, TABLE, SignAdam, largest_difference, shapes, step_alone, step_batch, train_alone
from torch import nn, optim

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory
from mbkit.optim.hyperparameters import SWITCHES, numbers_of
from mbkit.optim.rules import RULES
from mbkit.optim.stacked import _BLOCK, StackedOptimizer
from mbkit.optim.views import ViewsOptimizer

CASES = [
    pytest.param(cls, h, id=f"{cls.__name__}-{'+'.join(h)}-{i}") for cls, hs in TABLE.items() for i, h in enumerate(hs)
]
MIXED = [pytest.param(cls, hs[-1], id=cls.__name__) for cls, hs in TABLE.items()]


def run(cls: type, hyperparameters: dict, dtype: torch.dtype, steps: int) -> tuple[ModelBatch, list[nn.Module]]:
    models = shapes(dtype)
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(cls).create_optimizer(batch, **hyperparameters)
    step_batch(optimizer, batch, range(steps))
    assert largest_difference(batch, models) > 1e-3  # it did train
    train_alone(cls, hyperparameters, models, range(steps))
    return batch, models


@pytest.mark.parametrize(("cls", "hyperparameters"), CASES)
def test_float64_equals_lone_runs(cls: type, hyperparameters: dict) -> None:
    batch, models = run(cls, hyperparameters, torch.float64, steps=25)
    assert largest_difference(batch, models) <= 1e-12


@pytest.mark.parametrize(("cls", "hyperparameters"), CASES)
def test_float32_equals_lone_runs_to_the_bit(cls: type, hyperparameters: dict) -> None:
    batch, models = run(cls, hyperparameters, torch.float32, steps=12)
    assert largest_difference(batch, models) == 0


@pytest.mark.parametrize(
    ("cls", "hyperparameters"), [pytest.param(cls, hs[0], id=cls.__name__) for cls, hs in TABLE.items()]
)
def test_bfloat16_equals_lone_runs(cls: type, hyperparameters: dict) -> None:
    batch, models = run(cls, hyperparameters, torch.bfloat16, steps=12)
    # torch's own x.add(y, alpha=a) gives an element other bits in the last part of a tensor than in its middle
    # (552 of 5,000 differ), so the rules that end in one may be some last places (2**-6 for weights up to 4) off
    assert largest_difference(batch, models) <= (2**-4 if cls in (optim.SGD, optim.Adadelta, optim.Adafactor) else 0)


@pytest.mark.parametrize(("cls", "hyperparameters"), MIXED)
def test_complex_parameters_equal_lone_runs(cls: type, hyperparameters: dict) -> None:
    if cls is optim.Adafactor:  # which refuses them alone, too
        with pytest.raises(RuntimeError, match="Adafactor does not support complex parameters"):
            run(cls, hyperparameters, torch.complex128, steps=1)
        return
    # not to the bit: some classes decay weights in complex arithmetic, which rounds twice where real rounds once
    batch, models = run(cls, hyperparameters, torch.complex128, steps=12)
    assert largest_difference(batch, models) <= 1e-12


@pytest.mark.parametrize(("cls", "hyperparameters"), MIXED)
def test_large_batches_are_updated_block_by_block_to_the_same_bits(
    monkeypatch, cls: type, hyperparameters: dict
) -> None:
    sizes, rule = [], RULES[cls]
    counting = dataclasses.replace(rule, update=lambda ps, *rest: sizes.append(len(ps[0])) or rule.update(ps, *rest))
    monkeypatch.setitem(RULES, cls, counting)
    numbers = sum(math.prod(shape) for shape in SHAPES.values())
    monkeypatch.setitem(_BLOCK, "cpu", 3 * 4 * numbers)
    batch, models = run(cls, hyperparameters, torch.float32, steps=6)
    assert largest_difference(batch, models) == 0
    assert sizes[:4] == [3, 1, 3, 1]


class Renamed(optim.AdamW):
    """Overrides nothing of the update: a default of its own, a rate that it makes something of, and `zero_grad`."""

    def __init__(self, params: Iterable, lr: float = 0.1, decay: float = 0.2, note: str = "") -> None:
        super().__init__(params, lr=lr / 2, betas=(0.8, 0.9), weight_decay=decay)
        for group in self.param_groups:
            group["note"] = note

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none)


class Grouped(Renamed):
    """Overrides a part of the update."""

    def _init_group(self, group: dict, *args: Any, **kwargs: Any) -> bool:
        return super()._init_group({**group, "amsgrad": False}, *args, **kwargs)


class Hooked(optim.SGD):
    """Its constructor adds to the update."""

    def __init__(self, params: Iterable, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.register_step_post_hook(lambda *_: [p.data.mul_(0.9) for p in self.param_groups[0]["params"]])


class Replaced(optim.SGD):
    """Its constructor puts another step in place."""

    def __init__(self, params: Iterable, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.step = lambda closure=None: [p.data.mul_(0.9) for p in self.param_groups[0]["params"]]


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (Renamed, StackedOptimizer),
        (type("Bare", (optim.NAdam,), {}), StackedOptimizer),
        (Grouped, ViewsOptimizer),
        (SignAdam, ViewsOptimizer),
        (Hooked, ViewsOptimizer),
        (Replaced, ViewsOptimizer),
    ],
)
def test_a_subclass_that_overrides_nothing_of_the_update_keeps_its_rule(cls: type, kind: type) -> None:
    models, hyperparameters = shapes(torch.float64), {"lr": [0.1, 0.03, 0.01, 0.2]}
    hyperparameters |= {"decay": [0.0, 0.1, 0.2, 0.3], "note": ["a", "b", "c", "d"]} if issubclass(cls, Renamed) else {}
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(cls).create_optimizer(batch, **hyperparameters)
    assert type(optimizer) is kind
    step_batch(optimizer, batch, range(3))
    lones = [optimizer.unstack(m) for m in range(4)]
    again = OptimizerFactory(cls).create_optimizer(batch, **hyperparameters)
    again.load_state_dict(optimizer.state_dict())
    step_batch(again, batch, range(3, 6))
    for m, lone in enumerate(lones):
        step_alone(lone, lone.model, m, range(3, 6))
    assert largest_difference(batch, [lone.model for lone in lones]) <= 1e-12
    for m, lone in enumerate(train_alone(cls, hyperparameters, models, range(6))):
        said = {name: value for name, value in numbers_of(again.param_groups[m]).items() if name not in SWITCHES}
        assert said.items() <= lone.param_groups[0].items()
    assert largest_difference(batch, models) <= 1e-12
