"""Each planted defect does what its description says, and nothing else."""

import copy
import itertools

import pytest
import torch
from oracle import assert_same_models
from torch import nn

from mbkit import ModelBatch
from mbkit.verify.faults import FAULTS, StaleGradientOptimizer, plant
from mbkit.verify.subject import BatchRecipe


def make(num_models=3):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double() for _ in range(num_models)]
    batches = [(torch.randn(6, 4).double(), torch.randint(2, (6,))) for _ in range(8)]
    return models, batches


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_stale_gradients_are_those_of_a_model_that_is_never_cleared(optimizer_cls, cleared):
    """And where the user clears what the optimizer's own zero_grad leaves out, it is right."""
    models, batches = make()
    rates = [0.01, 0.05, 0.2]
    batch = ModelBatch(models)
    optimizer = StaleGradientOptimizer(batch, optimizer_cls, [{"lr": rate} for rate in rates])
    for x, y in batches:
        batch.zero_grad() if cleared else optimizer.zero_grad()
        batch.compute_loss(batch(x), y, nn.functional.cross_entropy).backward()
        optimizer.step()
    for model, rate in zip(models, rates, strict=True):
        alone = optimizer_cls(model.parameters(), lr=rate)
        for x, y in batches:
            if cleared:
                alone.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            alone.step()
    assert_same_models(batch, models, 1e-12)


def test_its_zero_grad_clears_the_copies_only():
    models, [(x, y), *_] = make()
    batch = ModelBatch(models)
    optimizer = StaleGradientOptimizer(batch, torch.optim.SGD, [{"lr": 0.1}] * 3)
    batch.compute_loss(batch(x), y, nn.functional.cross_entropy).backward()
    optimizer.step()
    before = {name: parameter.grad.clone() for name, parameter in batch.stacked_params.items()}
    assert all(copy.grad is not None for copies in optimizer.copies for copy in copies)
    optimizer.zero_grad()
    assert all(copy.grad is None for copies in optimizer.copies for copy in copies)
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in batch.stacked_params.items())


def test_learning_rates_can_be_changed_mid_run():
    models, [(x, y), *_] = make()
    batch = ModelBatch(models)
    optimizer = StaleGradientOptimizer(batch, torch.optim.SGD, [{"lr": 0.1}] * 3)
    optimizer.param_groups[1]["lr"] = 0.0
    before = batch.stacked_params["0.weight"].detach().clone()
    batch.compute_loss(batch(x), y, nn.functional.cross_entropy).backward()
    optimizer.step()
    moved = (batch.stacked_params["0.weight"] != before).flatten(1).any(1)
    assert moved.tolist() == [True, False, True]


def test_a_wrong_number_of_configs():
    batch = ModelBatch(make()[0])
    with pytest.raises(ValueError, match=r"Expected 3 configs \(one per model\), got 2"):
        StaleGradientOptimizer(batch, torch.optim.SGD, [{"lr": 0.1}] * 2)


# ---------------------------------------------------------------- each fault by its numbers, against models alone

M, SEEDS, CONFIGS = 3, [3, 1, 4], [{"lr": rate, "momentum": 0.9} for rate in (0.01, 0.05, 0.2)]
DATA = 4


def decay(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


class Case:
    """A batch with one fault after a step or more, and the same models alone, trained by plain PyTorch."""

    def __init__(self, name, steps=1, dropout=0.0, seed=0):
        torch.manual_seed(seed)
        layers = [lambda: nn.Linear(4, 5), nn.Tanh, lambda: nn.Dropout(dropout), lambda: nn.Linear(5, 2)]
        self.models = [nn.Sequential(*(make() for make in layers)).double() for _ in range(M)]
        self.data = [(torch.randn(6, 4).double(), torch.randint(2, (6,))) for _ in range(DATA)]
        self.steps = steps
        recipe = plant(BatchRecipe(torch.optim.SGD, scheduler=decay), name, seed=seed)
        self.subject = recipe(copy.deepcopy(self.models), CONFIGS, SEEDS)
        self.start = [self.parameters(m) for m in range(M)]
        for x, y in self.data[:steps]:
            self.subject.step(x, y, nn.functional.cross_entropy)

    def parameters(self, m):
        return {name: p.clone() for name, p in self.subject.parameters(m).items()}

    def alone(self, m, config=None, zero=True, training=True, start=None):
        """Return model m's parameters, last gradients and momenta, trained by itself."""
        model = copy.deepcopy(self.models[m]).train(training)
        if start is not None:
            model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), **(config or CONFIGS[m]))
        schedule = decay(optimizer)
        torch.manual_seed(SEEDS[m])
        for x, y in self.data[: self.steps]:
            if zero:
                optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        named = dict(model.named_parameters())
        momenta = {name: optimizer.state[p]["momentum_buffer"] for name, p in named.items()}
        return {name: p.detach() for name, p in named.items()}, {name: p.grad for name, p in named.items()}, momenta

    def off(self, got, expected):
        return {name for name, value in got.items() if not torch.allclose(value, expected[name], rtol=1e-9, atol=1e-12)}


def stale(seed):
    case = Case("stale-gradients", steps=3, seed=seed)
    assert not any(case.off(case.parameters(m), case.alone(m, zero=False)[0]) for m in range(M))


def other_weights(seed):
    case = Case("other-weights", seed=seed)
    for m in range(M):
        start = dict(case.models[m].named_parameters())
        assert case.off(case.start[m], start) == set(start)
        assert not case.off(case.parameters(m), case.alone(m, start=case.start[m])[0])


def other_order(seed):
    case = Case("other-order", seed=seed)
    walked = list(case.subject.walk(case.data))
    first = next(k for k, (x, _) in enumerate(case.data) if x is walked[0][0])
    assert first > 0
    assert [id(x) for x, _ in walked] == [id(x) for x, _ in case.data[first:] + case.data[:first]]


def other_masks(seed):
    assert not any(case.off(case.parameters(m), case.alone(m)[0]) for case in [Case("other-masks")] for m in range(M))
    case = Case("other-masks", dropout=0.5, seed=seed)
    assert all(case.off(case.parameters(m), case.alone(m)[0]) for m in range(M))


def other_mode(seed):
    case = Case("other-mode", dropout=0.5, seed=seed)
    assert not any(case.off(case.parameters(m), case.alone(m, training=False)[0]) for m in range(M))
    assert all(case.off(case.parameters(m), case.alone(m)[0]) for m in range(M))


def wrong_gradient(seed):
    case = Case("wrong-gradient", seed=seed)
    wrong = [(m, name) for m in range(M) for name in case.off(case.subject.gradients(m), case.alone(m)[1])]
    assert len(wrong) == 1
    [(m, name)] = wrong
    ratio = case.subject.gradients(m)[name] / case.alone(m)[1][name]
    factor = ratio.flatten()[0].item()
    torch.testing.assert_close(ratio, torch.full_like(ratio, factor), rtol=1e-6, atol=0)
    assert 0.04 < abs(factor - 1) < 0.51


def mean_loss(seed):
    case = Case("mean-loss", seed=seed)
    for m in range(M):
        assert not case.off(case.subject.gradients(m), {name: g / M for name, g in case.alone(m)[1].items()})


def clipped_across(seed):
    case = Case("clipped-across-models", seed=seed)
    every = [(case.subject.gradients(m)[name], g) for m in range(M) for name, g in case.alone(m)[1].items()]
    norm = torch.cat([got.flatten() for got, _ in every]).norm()
    assert 0.009 < norm < 0.1
    factor = norm / torch.cat([alone.flatten() for _, alone in every]).norm()
    for got, alone in every:
        torch.testing.assert_close(got, factor * alone, rtol=1e-9, atol=1e-12)


def setting_of_model_0(seed):
    case = Case("setting-of-model-0", steps=2, seed=seed)
    assert not any(case.off(case.parameters(m), case.alone(m, config=CONFIGS[0])[0]) for m in range(M))


def shared_state(seed):
    case = Case("shared-optimizer-state", seed=seed)
    assert not any(case.off(case.parameters(m), case.alone(m)[0]) for m in range(M))  # the first step is right
    momenta = [case.alone(m)[2] for m in range(M)]
    for m in range(M):
        for name, got in case.subject.optimizer_state(m).items():
            own = [one[name] for one in momenta]
            mixed = [own[m - 1], own[0], sum(own) / M]
            assert any(torch.allclose(got["momentum_buffer"], each, rtol=1e-9, atol=1e-12) for each in mixed), name


def leaking_update(seed):
    case = Case("leaking-update", seed=seed)
    alone = [case.alone(m)[0] for m in range(M)]
    [sink] = [m for m in range(M) if case.off(case.parameters(m), alone[m])]
    flat = [torch.cat([values[name].flatten() for name in case.start[0]]) for values in (*alone, *case.start)]
    got = torch.cat([p.flatten() for p in case.parameters(sink).values()]) - flat[sink]
    parts = [(got @ (flat[m] - flat[M + m])) / (flat[m] - flat[M + m]).square().sum() for m in range(M) if m != sink]
    updates = [flat[m] - flat[M + m] for m in range(M) if m != sink]
    fits = [part for part, own in zip(parts, updates, strict=True) if torch.allclose(got, part * own, atol=1e-12)]
    assert len(fits) == 1
    assert 0.009 < fits[0] < 0.11


def shared_memory(seed):
    case = Case("shared-memory", seed=seed)
    subject = case.subject
    kinds = [subject.parameters, subject.gradients]
    kinds.append(lambda m: {name: state["momentum_buffer"] for name, state in subject.optimizer_state(m).items()})
    common = []
    for reader in kinds:
        for name in case.start[0]:
            ends = [
                (value.data_ptr(), value.data_ptr() + value.nbytes) for value in (reader(m)[name] for m in range(M))
            ]
            common += [name for a, b in itertools.combinations(ends, 2) if a[0] < b[1] and b[0] < a[1]]
    assert len(common) == M - 1  # each model begins on the last number of the one before it, in one tensor
    assert len(set(common)) == 1


def schedule_m_times(seed):
    case = Case("schedule-stepped-M-times", seed=seed)
    for m in range(M):
        assert case.subject.learning_rate(m) == pytest.approx(CONFIGS[m]["lr"] * 0.5**M)


PLANTED = {
    "stale-gradients": stale,
    "other-weights": other_weights,
    "other-order": other_order,
    "other-masks": other_masks,
    "other-mode": other_mode,
    "wrong-gradient": wrong_gradient,
    "mean-loss": mean_loss,
    "clipped-across-models": clipped_across,
    "setting-of-model-0": setting_of_model_0,
    "shared-optimizer-state": shared_state,
    "leaking-update": leaking_update,
    "shared-memory": shared_memory,
    "schedule-stepped-M-times": schedule_m_times,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_does_what_its_description_says(name, seed):
    PLANTED[name](seed)
