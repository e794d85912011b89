"""Resuming, copying and unstacking, for every class of optimizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optimizers import (
    ALL,
    TABLE,
    VIEWED,
    GlobalNorm,
    M,
    Shapes,
    create,
    create_alone,
    every_class,
    grouped,
    largest_difference,
    same,
    start,
    step_alone,
    step_batch,
)
from torch import nn, optim

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory

LR = [0.1, 0.03, 0.01, 0.003]


@pytest.mark.parametrize(("dtype", "through_file"), [(torch.float32, False), (torch.float64, True)], ids=str)
@grouped
@every_class
def test_resumes_to_the_same_bits(
    case: tuple[type, dict], in_groups: bool, dtype: torch.dtype, through_file: bool, tmp_path: Path
) -> None:
    cls, hyperparameters = case
    _, batch, optimizer = start(cls, hyperparameters, dtype, in_groups)
    step_batch(optimizer, batch, range(7))
    optimizer.param_groups[0]["lr"] *= 0.5
    state, middle = optimizer.state_dict(), ModelBatch(batch.models)
    if through_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    beside = {"norm_type": hyperparameters["norm_type"]} if cls is GlobalNorm else {}  # not in the state
    resumed = create(cls, {"lr": 0.5, **beside}, middle, in_groups)
    resumed.load_state_dict(state)
    # First one, then the other: were anything shared, the second would go on from the first one's end.
    step_batch(resumed, middle, range(7, 15))
    step_batch(optimizer, batch, range(7, 15))
    assert same(batch, middle)
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
    resumed.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"] = 0.2  # the groups that were loaded are live
    step_batch(resumed, middle, range(15, 17))
    step_batch(optimizer, batch, range(15, 17))
    assert same(batch, middle)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@grouped
@every_class
def test_copies_go_on_by_themselves(case: tuple[type, dict], in_groups: bool, copied) -> None:
    _, batch, optimizer = start(*case, in_groups=in_groups)
    step_batch(optimizer, batch, range(5))
    batch2, optimizer2 = copied((batch, optimizer))
    optimizer.param_groups[1]["lr"] = optimizer2.param_groups[1]["lr"] = 0.02
    step_batch(optimizer2, batch2, range(5, 10))
    assert not same(batch, batch2)
    step_batch(optimizer, batch, range(5, 10))
    assert same(batch, batch2)


@pytest.mark.parametrize("m", [0, 1])  # their flags differ
@grouped
@every_class
def test_unstacked_model_goes_on_alone(case: tuple[type, dict], in_groups: bool, m: int) -> None:
    cls, hyperparameters = case
    models, batch, optimizer = start(cls, hyperparameters, in_groups=in_groups)
    lone = create_alone(cls, hyperparameters, models[m], m, in_groups)
    step_batch(optimizer, batch, range(5))
    step_alone(lone, models[m], m, range(5))
    optimizer.groups_of(m)[-1]["lr"] = lone.param_groups[-1]["lr"] = 0.02
    single = optimizer.unstack(m - M)
    assert type(single) is cls
    assert single.param_groups[0].keys() == lone.param_groups[0].keys()
    # The state has the very form that torch gives it: names, shapes, dtypes, devices.
    forms = [
        [
            {k: (v.shape, v.dtype, v.device) if torch.is_tensor(v) else v for k, v in o.state.get(p, {}).items()}
            for p in ps
        ]
        for o, ps in ((single, single.model.parameters()), (lone, models[m].parameters()))
    ]
    assert forms[0] == forms[1]
    step_batch(optimizer, batch, range(5, 15))
    step_alone(single, single.model, m, range(5, 15))
    step_alone(lone, models[m], m, range(5, 15))
    for p, q, r in zip(single.model.parameters(), models[m].parameters(), batch.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r[m])


def test_unstack_takes_a_model_and_refuses_others() -> None:
    _, batch, optimizer = start(optim.Adam, {"lr": LR})
    step_batch(optimizer, batch, range(2))
    own = batch[-1]
    assert optimizer.unstack(-1, own).model is own
    assert optimizer.unstack(-1, own).param_groups[0]["lr"] == LR[-1]
    with pytest.raises(IndexError, match="from 0 to 3, got 4"):
        optimizer.unstack(4)
    with pytest.raises(ValueError, match=r"pass batch\[1\], or nothing"):
        optimizer.unstack(1, nn.Linear(2, 2))


@pytest.mark.parametrize("cls", [optim.Adam, optim.NAdam, optim.SGD])
def test_goes_on_after_the_batch_changed_dtype(cls: type) -> None:
    momentum = {"momentum": 0.9} if cls is optim.SGD else {}
    models, batch, optimizer = start(cls, {"lr": LR, **momentum})
    step_batch(optimizer, batch, range(3))
    loaded_into = ModelBatch([model.double() for model in batch.models])
    loaded = OptimizerFactory(cls).create_optimizer(loaded_into, lr=LR, **momentum)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    batch.double()
    single = optimizer.unstack(1)
    for one, its in ((optimizer, batch), (loaded, loaded_into)):
        step_batch(one, its, range(3, 6))
    step_alone(single, single.model, 1, range(3, 6))
    assert largest_difference(batch, models) > 1e-3
    assert same(batch, loaded_into)
    assert all(
        (p - q[1]).abs().max() < 1e-12 for p, q in zip(single.model.parameters(), batch.parameters(), strict=True)
    )


def test_foreign_states_are_refused() -> None:
    _, batch, optimizer = start(optim.Adam, {"lr": LR})
    step_batch(optimizer, batch, range(1))
    state = optimizer.state_dict()
    smaller = ModelBatch([Shapes(torch.float32) for _ in range(2)])
    with pytest.raises(ValueError, match=r"for 2 models with 1 group\(s\) of parameters each, got one of 4 groups"):
        OptimizerFactory(optim.Adam).create_optimizer(smaller).load_state_dict(state)
    with pytest.raises(ValueError, match="state of SGD for groups with all hyperparameters, got one without momentum"):
        start(optim.SGD, {})[2].load_state_dict(state)
    with pytest.raises(ValueError, match="state of ASGD"):
        start(optim.ASGD, {})[2].load_state_dict(state)
    other = ModelBatch([nn.ParameterList([nn.Parameter(torch.zeros(3)) for _ in range(4)]) for _ in range(M)])
    with pytest.raises(ValueError, match=r"a parameter of shape \(4, 3\), got 'exp_avg' of shape \(4,\)"):
        OptimizerFactory(optim.Adam).create_optimizer(other).load_state_dict(state)
    viewed = start(optim.ASGD, {})[2].state_dict()
    with pytest.raises(ValueError, match=r"shapes \[\(4, 3\)"):
        OptimizerFactory(optim.ASGD).create_optimizer(other).load_state_dict(viewed)
    before = optimizer.state_dict()["param_groups"]
    assert before == state["param_groups"]


def test_a_state_from_before_a_flag_existed_is_loaded() -> None:
    _, batch, optimizer = start(optim.NAdam, {"lr": LR})
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["maximize"]
    optimizer.load_state_dict(state)
    step_batch(optimizer, batch, range(1))
    assert [group["maximize"] for group in optimizer.param_groups] == [False] * M


def damages(state: dict, i: int) -> dict[str, Callable[[], object]]:
    """Return ways to damage the state of a stacked optimizer, each in place."""
    own, groups = state["state"][i], state["param_groups"]
    name = next(name for name, value in own.items() if value.dim() > 1)
    count = next(name for name, value in own.items() if value.dim() == 1)
    return {
        "no such keys": lambda: state.clear(),
        "swapped numbers": lambda: groups[0].update(params=groups[0]["params"][::-1]),
        "a number twice": lambda: groups[0].update(params=[0, *groups[0]["params"][:-1]]),
        "an unknown number": lambda: state["state"].update({99: own}),
        "no moment": lambda: own.pop(name),
        "no count": lambda: own.pop(count),
        "another name": lambda: own.update(other=own.pop(name)),
        "another shape": lambda: own.update({name: own[name][..., 1:]}),
        "another order of dimensions": lambda: own.update({name: own[name].mT}),
        "counts of one model": lambda: own.update({count: own[count][:1]}),
        "whole numbers": lambda: own.update({name: own[name].long()}),
        "complex numbers": lambda: own.update({name: own[name].to(torch.complex64)}),
        "no memory": lambda: own.update({name: own[name].to("meta")}),
        "sparse": lambda: own.update({name: own[name].to_sparse()}),
        "no tensor": lambda: own.update({count: 3.0}),
        "a model without lr": lambda: groups[2].pop("lr"),
        "lr of another form": lambda: groups[2].update(lr="0.1"),
    }


def equal(a: object, b: object) -> bool:
    """Compare nested dicts and lists, their tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


KINDS = sorted(damages({"state": {0: {"a": torch.ones(1, 1), "b": torch.ones(1)}}, "param_groups": []}, 0))
STACKED = [case for case in ALL if case[0] in TABLE]


@pytest.mark.parametrize("case", STACKED, ids=lambda case: case[0].__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_state_changes_nothing(case: tuple[type, dict], kind: str) -> None:
    _, batch, optimizer = start(*case)
    step_batch(optimizer, batch, range(2))
    damaged = copy.deepcopy(optimizer.state_dict())
    damages(damaged, 2)[kind]()
    step_batch(optimizer, batch, range(2, 3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((ValueError, TypeError), match="Expected"):
        optimizer.load_state_dict(damaged)
    assert equal(optimizer.state_dict(), before)
    step_batch(optimizer, batch, range(3, 4))


@pytest.mark.parametrize(
    "kind",
    ["a name less", "swapped numbers", "another shape", "a model less", "no such keys", "nothing noted", "no state"],
)
@pytest.mark.parametrize("case", [case for case in VIEWED if case[0] in (optim.ASGD, optim.Rprop)], ids=str)
def test_a_damaged_state_of_lone_optimizers_changes_nothing(case: tuple[type, dict], kind: str) -> None:
    _, batch, optimizer = start(*case)
    step_batch(optimizer, batch, range(2))
    damaged = copy.deepcopy(optimizer.state_dict())
    models = damaged["state"]["models"]
    own, groups = models[2]["state"][2], models[2]["param_groups"]
    name = next(name for name, value in own.items() if value.dim() > 1)
    {
        "a name less": lambda: own.pop(name),
        "swapped numbers": lambda: groups[0].update(params=groups[0]["params"][::-1]),
        "another shape": lambda: own.update({name: own[name][:1]}),
        "a model less": lambda: models.pop(),
        "no such keys": lambda: damaged.clear(),
        "nothing noted": lambda: damaged["state"]["forms"].clear(),
        "no state": lambda: damaged["state"].clear(),
    }[kind]()
    step_batch(optimizer, batch, range(2, 3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="Expected"):
        optimizer.load_state_dict(damaged)
    assert equal(optimizer.state_dict(), before)


class Picky(optim.Rprop):
    """A class with a way to load that refuses a state when other models have loaded theirs."""

    def load_state_dict(self, state_dict: dict) -> None:
        if state_dict["param_groups"][0]["lr"] == 0.01:
            raise RuntimeError("not this one")
        super().load_state_dict(state_dict)


def test_all_lone_optimizers_load_or_none() -> None:
    _, batch, optimizer = start(Picky, {"lr": LR})
    step_batch(optimizer, batch, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    for m in range(M):
        optimizer.param_groups[m]["lr"] = 0.5
    step_batch(optimizer, batch, range(2, 3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="not this one"):
        optimizer.load_state_dict(state)
    assert equal(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    ("cls", "name"), [(optim.Adam, "amsgrad"), (optim.RMSprop, "centered"), (optim.SGD, "momentum")]
)
def test_what_was_switched_on_before_saving_is_loaded(cls: type, name: str) -> None:
    _, batch, optimizer = start(cls, {"lr": LR, **({"momentum": [0.9, 0, 0, 0]} if cls is optim.SGD else {})})
    step_batch(optimizer, batch, range(2))
    optimizer.param_groups[1][name] = 0.5 if name == "momentum" else True
    other = ModelBatch(batch.models)
    loaded = OptimizerFactory(cls).create_optimizer(other)
    loaded.load_state_dict(optimizer.state_dict())
    step_batch(optimizer, batch, range(2, 5))
    step_batch(loaded, other, range(2, 5))
    assert same(batch, other)
