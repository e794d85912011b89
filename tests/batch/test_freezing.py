"""A frozen model is left as it is, a model at NaN is stopped in time, and the others never notice, to the bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import SEEDS, B, M, close
from torch import nn, optim

from mbkit import BatchingError, ModelBatch, OptimizerFactory, fit, train_steps
from mbkit.batch.context import context_of
from mbkit.optim.stacked import _BLOCK
from mbkit.training.compilable import check_step

STEPS = 8
CLASSES = [
    (optim.Adam, {"lr": 0.02, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (optim.Rprop, {"lr": 0.01}),
]
both_kinds = pytest.mark.parametrize(("cls", "numbers"), CLASSES, ids=lambda v: getattr(v, "__name__", ""))


class Net(nn.Module):
    """BatchNorm, dropout, a buffer that is assigned anew, and a tensor in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
        self.register_buffer("mean", torch.zeros(2))
        self.latest = torch.zeros(2, dtype=torch.float64)

    def forward(self, x):
        y = self.layers(x) + self.mean
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        self.latest = y.detach().mean(0)
        return y


def build(count=M):
    torch.manual_seed(1)
    return [Net().double() for _ in range(count)]


def data(steps=STEPS):
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(M, B, n, dtype=torch.float64, generator=generator) for n in (3, 2)] for _ in range(steps)]


def step_batch(batch, optimizer, x, y, max_norm=None):
    optimizer.zero_grad()
    batch.compute_loss(batch(x), y, nn.functional.mse_loss).backward()
    if max_norm:
        batch.clip_grad_norm_(max_norm)
    optimizer.step()


def everything(batch, optimizer, m):
    """All that model m has: its tensors, its stream, its share of the optimizer's state."""
    lone = optimizer.unstack(m)
    states = [t for p in lone.param_groups[0]["params"] for _, t in sorted(lone.state.get(p, {}).items())]
    return [*batch.get_model_states()[m].values(), batch[m].latest, batch.streams.on("cpu")[m].get_state(), *states]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@both_kinds
@pytest.mark.parametrize("how", ["vmap", "model by model", "updates block by block"])
def test_a_frozen_model_keeps_everything_and_trains_on_as_alone(monkeypatch, cls, numbers, how):
    """Steps 2 to 4 pass model 1 by; alone it just does not make them."""
    whole = how == "model by model"
    if how == "updates block by block":
        monkeypatch.setitem(_BLOCK, "cpu", 1)
    models = build()
    batch = ModelBatch(copy.deepcopy(models), shared_input=False, seeds=SEEDS, model_by_model=[""] if whole else [])
    optimizer = OptimizerFactory(cls).create_optimizer(batch, **numbers)
    for step, (x, y) in enumerate(data()):
        if step == 2:
            batch.freeze(1)
            kept = everything(batch, optimizer, 1)
        if step == 5:
            assert batch.frozen == [1]
            assert_same(everything(batch, optimizer, 1), kept)
            batch.unfreeze(1)
        step_batch(batch, optimizer, x, y)
        batch.eval()
        batch(x)  # a look at the outputs changes nothing either
        batch.train()
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        lone = cls(model.parameters(), **numbers)
        for step, (x, y) in enumerate(data()):
            frozen = m == 1 and 2 <= step < 5
            if not frozen:
                lone.zero_grad()
                nn.functional.mse_loss(model(x[m]), y[m]).backward()
                lone.step()
                with torch.no_grad():
                    model.eval()(x[m])
                    model.train()
        for name, expected in model.state_dict().items():
            close(batch.get_model_states()[m][name], expected, 1e-12, f"{name} of model {m}")
        close(batch[m].latest, model.latest, 1e-12, "latest")
        assert torch.equal(batch.streams.on("cpu")[m].get_state(), torch.get_rng_state())


@both_kinds
@pytest.mark.parametrize(("max_norm", "spoilt"), [(None, torch.inf), (0.1, torch.nan), (0.1, torch.inf)])
def test_a_model_that_is_lost_takes_nobody_with_it(cls, numbers, max_norm, spoilt):
    """Model 2's input breaks in step 3; whether it is stopped or not, the others have the bits they have without."""
    results = {}
    for how in (None, "freeze", "unspoilt"):
        batch = ModelBatch(build(), shared_input=False, seeds=SEEDS)
        optimizer = OptimizerFactory(cls).create_optimizer(batch, **numbers)
        batches = data()
        if how != "unspoilt":
            batches[3][0][2, 0, 0] = spoilt
        choice = None if how == "unspoilt" else how
        history = fit(
            batch, optimizer, batches, nn.functional.mse_loss, max_norm=max_norm, on_nonfinite=choice, progress=False
        )
        results[how] = [everything(batch, optimizer, m) for m in range(M)]
        if how == "freeze":
            assert batch.frozen == [2]
            assert history.frozen == [None, None, 3, None]
            assert history.steps_done == [8, 8, 3, 8]
            assert [line.split()[-1] for line in str(history).splitlines()[1:]] == ["step", "-", "-", "3", "-"]
            assert history.final()["loss"].isfinite().all()
            frozen = batch, optimizer
    for how in (None, "freeze"):
        for m in (0, 1, 3):
            assert_same(results[how][m], results["unspoilt"][m])
    # Stopped in time: parameters and optimizer are those of a lone model that broke off before step 3's update.
    batch, optimizer = frozen
    model = build()[2]
    torch.manual_seed(SEEDS[2])
    lone = cls(model.parameters(), **numbers)
    for x, y in data()[:3]:
        lone.zero_grad()
        nn.functional.mse_loss(model(x[2]), y[2]).backward()
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        lone.step()
    for name, p in model.named_parameters():
        close(batch.stacked_params[name][2], p, 1e-12, name)
    for p, q in zip(model.parameters(), optimizer.unstack(2).param_groups[0]["params"], strict=True):
        for name, value in optimizer.unstack(2).state.get(q, {}).items():
            if name in lone.state[p]:
                close(torch.as_tensor(value), torch.as_tensor(lone.state[p][name]), 1e-12, name)


def test_a_gradient_alone_that_is_not_finite():
    """sqrt at 0: the loss is finite, its gradient is not."""
    models = [nn.Linear(3, 2, bias=False) for _ in range(3)]
    nn.init.zeros_(models[1].weight)
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(optim.SGD).create_optimizer(batch, lr=0.1)
    history = fit(
        batch, optimizer, [(torch.ones(4, 3), torch.ones(4, 2))], root_loss, on_nonfinite="freeze", progress=False
    )
    assert history.frozen == [None, 0, None]
    assert history.loss.isfinite().all()
    assert torch.equal(batch.weight[1], torch.zeros(2, 3))
    assert not torch.equal(batch.weight[0], models[0].weight)


def root_loss(output, target):
    return output.abs().sum().sqrt()


def test_raise_names_the_models_and_leaves_the_batch_as_it_was():
    batch = ModelBatch(build(), shared_input=False, seeds=SEEDS)
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, lr=0.02)
    batches = data()
    batches[3][0][2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"models \[2\] is not finite") as caught:
        fit(batch, optimizer, batches, nn.functional.mse_loss, on_nonfinite="raise", progress=False)
    assert caught.value.history.steps == 3
    assert all(p.isfinite().all() for p in batch.parameters())


def test_only_our_optimizers_can_leave_models_out():
    batch = ModelBatch(build())
    plain = optim.SGD(batch.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"Expected an optimizer from OptimizerFactory .* got SGD"):
        train_steps(batch, plain, data(), nn.functional.mse_loss, on_nonfinite="freeze")
    with pytest.raises(ValueError, match=r"None, 'freeze' or 'raise', got 'stop'"):
        train_steps(batch, plain, data(), nn.functional.mse_loss, on_nonfinite="stop")


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "file"])
def test_it_survives_saving(way, tmp_path):
    batch = ModelBatch(build(), shared_input=False, seeds=SEEDS)
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, lr=0.02)
    for x, y in data()[:2]:
        step_batch(batch, optimizer, x, y)
    batch.freeze([0, 3])
    if way in ("pickle", "deepcopy"):
        copied = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
        other = copied.batch
    else:
        other = ModelBatch(build(), shared_input=False, seeds=range(M))
        copied = OptimizerFactory(optim.Adam).create_optimizer(other, lr=0.02)
        state = batch.state_dict()
        if way == "file":
            torch.save(state, tmp_path / "batch.pt")
            state = torch.load(tmp_path / "batch.pt", weights_only=True)
        other.load_state_dict(state)
        copied.load_state_dict(optimizer.state_dict())
        context_of(other).template.latest.copy_(
            context_of(batch).template.latest
        )  # a plain attribute, which no state_dict holds
    assert other.frozen == [0, 3]
    for b, o in ((batch, optimizer), (other, copied)):
        for x, y in data()[2:4]:
            step_batch(b, o, x, y)
    for m in range(M):
        assert_same(everything(other, copied, m), everything(batch, optimizer, m))
    batch.unfreeze(range(M))
    other.load_state_dict(batch.state_dict())
    assert other.frozen == []


def test_what_is_one_value_for_all_models_is_refused():
    class Counts(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    batch = ModelBatch([Counts(3, 2) for _ in range(3)])
    batch(torch.ones(4, 3))
    batch.freeze(1)
    with pytest.raises(BatchingError, match="changes 'calls', which is one value for all models"):
        batch(torch.ones(4, 3))


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_in_chunks(chunk_size):
    """A model that is lost in step 3 is stopped, whichever chunk it is in, as it is without chunks."""
    ends = []
    for size in (None, chunk_size):
        batch = ModelBatch(build(), shared_input=False, seeds=SEEDS)
        optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, lr=0.02)
        batches = data()
        batches[3][0][2, 0, 0] = torch.nan
        history = fit(
            batch, optimizer, batches, nn.functional.mse_loss, on_nonfinite="freeze", chunk_size=size, progress=False
        )
        assert history.frozen == [None, None, 3, None]
        ends.append((batch.get_model_states(), [g.get_state() for g in batch.streams.on("cpu")]))
    for m in range(M):
        for name, expected in ends[0][0][m].items():
            torch.testing.assert_close(ends[1][0][m][name], expected, rtol=0, atol=1e-12, equal_nan=True)
        assert torch.equal(ends[0][1][m], ends[1][1][m])


def test_where_nobody_is_lost_nothing_is_left_behind():
    """Neither an entry in the state, nor a mask of nobody, for which the next run would not be compiled."""
    batch = ModelBatch([nn.Linear(3, 2) for _ in range(5)])
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, lr=0.1)
    pairs = [(torch.randn(B, 3), torch.randn(B, 2)) for _ in range(3)]
    keys = batch.state_dict().keys()
    history = fit(batch, optimizer, pairs, nn.functional.mse_loss, on_nonfinite="freeze", progress=False)
    assert history.frozen == []
    assert context_of(batch).frozen is None
    assert batch.state_dict().keys() == keys
    check_step(batch, optimizer)


def test_a_mask_of_nobody_is_dropped_when_it_is_read():
    """On an accelerator nothing waits for the mask, so it may be one of nobody."""
    batch = ModelBatch(build())
    context_of(batch).frozen = torch.zeros(M, dtype=torch.bool)
    assert batch.frozen == []
    assert context_of(batch).frozen is None
