"""What every optimizer of a batch promises, whichever its class: live numbers, live gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from optimizers import (
    TABLE,
    GlobalNorm,
    M,
    config_of,
    every_class,
    largest_difference,
    same,
    start,
    step_alone,
    step_batch,
)
from oracle import batches, build
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory
from mbkit.optim.each import Each
from mbkit.optim.hyperparameters import Columns, Hyperparameters, ModelGroup
from mbkit.optim.rules import RULES

LR = [0.1, 0.03, 0.01, 0.003]

# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("cls", [optim.Adam, optim.Rprop])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_two_backwards_add_up_and_nothing_goes_stale(cls: type, set_to_none: bool) -> None:
    models, data, loss_fn = build("mlp"), batches(own=False, steps=20), nn.functional.mse_loss
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=LR)
    lone = [cls(model.parameters(), lr=lr) for model, lr in zip(models, LR, strict=True)]
    for halves in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad(set_to_none)
        for x, y in halves:
            batch.compute_loss(batch(x), y, loss_fn, reduction="none").sum().backward()
        optimizer.step()
        for model, one in zip(models, lone, strict=True):
            one.zero_grad(set_to_none)
            for x, y in halves:
                loss_fn(model(x), y).backward()
            one.step()
    assert largest_difference(batch, models) <= 1e-12


@every_class
def test_zero_grad_clears_what_the_step_reads(case: tuple[type, dict]) -> None:
    cls, hyperparameters = case
    _, batch, optimizer = start(cls, hyperparameters)
    step_batch(optimizer, batch, range(1))
    optimizer.zero_grad()
    assert all(p.grad is None for p in batch.parameters())
    before = copy.deepcopy(batch)
    if cls is not GlobalNorm:  # which divides by its gradients' norm
        optimizer.step()
    assert same(batch, before)


@every_class
def test_closure_and_hooks(case: tuple[type, dict]) -> None:
    cls, hyperparameters = case
    _, batch, optimizer = start(cls, hyperparameters)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in batch.parameters())
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert seen == ["before", "after"]
    assert first.item() != optimizer.step(closure).item()


def test_hooks_of_all_optimizers_and_a_profiler_see_a_step() -> None:
    optimizer = start(optim.Adam, {"lr": LR})[2]
    lone, seen = optim.Adam([torch.ones(1, requires_grad=True)]), []
    see = lambda one, args, kwargs: seen.append((len(args), kwargs))  # noqa: E731
    hooks = [register_optimizer_step_pre_hook(see), register_optimizer_step_post_hook(see)]
    try:
        for one in (lone, optimizer):
            one.step()
    finally:
        for hook in hooks:
            hook.remove()
    optimizer.step()
    assert seen == [seen[0]] * 4
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in {event.name for event in profile.function_events}


@every_class
def test_groups_hold_each_parameter_once(case: tuple[type, dict]) -> None:
    _, batch, optimizer = start(*case)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(optimizer.param_groups) == M
    assert held == [id(p) for p in batch.parameters()]


def test_a_grad_scaler_works_as_on_any_optimizer() -> None:
    models, batch, optimizer = start(optim.SGD, {"lr": LR})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(sum(p.square().sum() for p in batch.parameters())).backward()
    scaler.step(optimizer)
    scaler.update()
    for model, lr in zip(models, LR, strict=True):
        for p in model.parameters():
            p.data.sub_(2 * p.data, alpha=lr)
    assert largest_difference(batch, models) < 1e-6


# ---------------------------------------------------------------------- numbers changed mid-run

WRITES = {
    "item": lambda group, value: group.__setitem__("lr", value),
    "update": lambda group, value: group.update({"lr": value}),
    "keyword update": lambda group, value: group.update(lr=value),
    "or": lambda group, value: group.__ior__({"lr": value}),
    "pop, setdefault": lambda group, value: (group.pop("lr"), group.setdefault("lr", value)),
    "del, item": lambda group, value: (group.__delitem__("lr"), group.__setitem__("lr", value)),
    "tensor": lambda group, value: group.__setitem__("lr", torch.tensor(value, dtype=torch.float64)),
    "clear": lambda group, value: (old := dict(group), group.clear(), group.update({**old, "lr": value})),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("cls", [optim.AdamW, optim.ASGD])
def test_every_way_to_write_a_number_is_noticed(cls: type, write) -> None:
    models, batch, optimizer = start(cls, {"lr": LR})
    lone = [cls(model.parameters(), lr=lr) for model, lr in zip(models, LR, strict=True)]
    for steps, value in ((range(2), 0.07), (range(2, 4), 0.0002)):
        write(optimizer.param_groups[2], value)
        lone[2].param_groups[0]["lr"] = value
        step_batch(optimizer, batch, steps)
        for m in range(M):
            step_alone(lone[m], models[m], m, steps)
        assert optimizer.param_groups[2]["lr"] == value
        assert cls is optim.ASGD or type(optimizer.param_groups[2]["lr"]) is float
    assert largest_difference(batch, models) == 0


@pytest.mark.parametrize("name", ["betas", "amsgrad", "maximize", "weight_decay"])
def test_settings_switched_on_mid_run(name: str) -> None:
    values = {"betas": (0.5, 0.6), "amsgrad": True, "maximize": True, "weight_decay": 0.3}
    models, batch, optimizer = start(optim.Adam, {"lr": LR})
    lone = [optim.Adam(model.parameters(), lr=lr) for model, lr in zip(models, LR, strict=True)]
    for steps in (range(3), range(3, 6)):
        step_batch(optimizer, batch, steps)
        for m in range(M):
            step_alone(lone[m], models[m], m, steps)
        optimizer.param_groups[1][name] = lone[1].param_groups[0][name] = values[name]
        for state in lone[1].state.values():  # torch's Adam stops with a KeyError here; start from zero, as ours does
            state.setdefault("max_exp_avg_sq", torch.zeros_like(state["exp_avg"])) if name == "amsgrad" else None
    assert largest_difference(batch, models) == 0


@pytest.mark.parametrize(
    ("cls", "before", "after"), [(optim.SGD, 0.0, 0.9), (optim.SGD, 0.9, 0.0), (optim.RMSprop, 0.9, 0.0)]
)
def test_momentum_switched_on_and_off(cls: type, before: float, after: float) -> None:
    hyperparameters = {"momentum": [before, 0.5, before, 0.0]} | ({"dampening": 0.5} if cls is optim.SGD else {})
    models, batch, optimizer = start(cls, hyperparameters)
    lone = [cls(models[m].parameters(), **config_of(hyperparameters, m)) for m in range(M)]
    for steps, momentum in ((range(3), after), (range(3, 6), before), (range(6, 9), after)):
        step_batch(optimizer, batch, steps)
        for m in range(M):
            step_alone(lone[m], models[m], m, steps)
        optimizer.param_groups[0]["momentum"] = lone[0].param_groups[0]["momentum"] = momentum
    assert largest_difference(batch, models) == 0


def test_a_step_reads_no_group_that_nobody_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    _, batch, optimizer = start(optim.Adam, {"lr": LR})
    step_batch(optimizer, batch, range(1))
    reads = []
    monkeypatch.setattr(
        ModelGroup, "__getitem__", lambda group, name: reads.append(name) or dict.__getitem__(group, name)
    )
    step_batch(optimizer, batch, range(1, 3))
    assert set(reads) == {"params"}  # group 0's
    assert len(reads) < 2 * M
    reads.clear()
    optimizer.param_groups[3]["lr"] = 0.5
    step_batch(optimizer, batch, range(3, 4))
    assert reads.count("lr") == M
    assert set(reads) == {"params", "lr"}


def test_a_number_that_is_none_is_refused_by_name() -> None:
    _, batch, optimizer = start(optim.Adam, {"lr": LR})
    optimizer.param_groups[2]["lr"] = "fast"
    with pytest.raises(TypeError, match=r"'lr' of all models, got 'fast' for model 2"):
        step_batch(optimizer, batch, range(1))
    optimizer.param_groups[2]["lr"] = 0.1
    optimizer.param_groups[1]["betas"] = (0.9,)
    with pytest.raises(TypeError, match=r"'betas' of all models, got \(0.9,\) for model 1"):
        step_batch(optimizer, batch, range(1))


# ---------------------------------------------------------------------- the rules' own form


@pytest.mark.parametrize("cls", TABLE, ids=lambda cls: cls.__name__)
def test_rules_never_read_a_value_in_python(cls: type) -> None:
    """Fake tensors have shapes and no values: a rule that asked for one could not be compiled, and would stop here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    hyperparameters = TABLE[cls][-1]
    _, batch, optimizer = start(cls, hyperparameters)
    step_batch(optimizer, batch, range(1))
    (columns,) = optimizer.columns
    columns.refresh()
    params = list(batch.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = {name: mode.from_tensor(column) for name, column in columns.at(params).columns.items()}
        params = [mode.from_tensor(p.detach()) for p in params]
        states = [{k: mode.from_tensor(v) for k, v in optimizer.state[p].items()} for p in batch.parameters()]
        h = Hyperparameters(fake, columns.flags, params)
        RULES[cls].update(Each(params), Each(map(torch.ones_like, params)), states, h)


def test_a_rate_that_is_written_anew_lies_where_it_lay():
    """A step that was recorded on a GPU reads it there."""
    columns = Columns([{"lr": 0.1}, {"lr": 0.2}], ["lr"], (), ())
    columns.refresh()
    param = torch.zeros(2, 3)
    place = columns.at([param])["lr"].data_ptr()
    columns.groups[1]["lr"] = 0.5
    columns.refresh()
    assert columns.at([param])["lr"].tolist() == [0.1, 0.5]
    assert columns.at([param])["lr"].data_ptr() == place
