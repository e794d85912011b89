"""compare: finds the batch equal to lone models where it is, and every planted fault where it is not."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from diagnosis_cases import Complex
from torch import nn

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory
from mbkit.verify import compare
from mbkit.verify.faults import FAULTS, plant
from mbkit.verify.subject import BatchRecipe

M, STEPS = 3, 8
CONFIGS = [{"lr": lr} for lr in (0.002, 0.01, 0.05)]


def build_models(dtype, kind="mlp"):
    torch.manual_seed(1)
    if kind == "mlp":
        layers = [lambda: nn.Linear(6, 12), lambda: nn.BatchNorm1d(12), nn.ReLU, lambda: nn.Dropout(0.3)]
        return [nn.Sequential(*(make() for make in layers), nn.Linear(12, 3)).to(dtype) for _ in range(M)]
    return [
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)).to(dtype)
        for _ in range(M)
    ]


def build_data(dtype, kind="mlp", leading=()):
    torch.manual_seed(2)
    shape = (16, 6) if kind == "mlp" else (16, 2, 8, 8)
    return [(torch.randn(*leading, *shape, dtype=dtype), torch.randint(3, (*leading, 16))) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("kind", ["mlp", "convolution"])
def test_the_batch_is_equivalent_to_its_models_alone(dtype, optimizer_cls, kind):
    data = build_data(dtype, kind)
    report = compare(build_models(dtype, kind), optimizer_cls, CONFIGS, data, F.cross_entropy, STEPS, range(M))
    report.assert_equivalent()
    assert report.verdict.startswith("EQUIVALENT")
    judged = [p for p, name in enumerate(report.parameters) if (kind, name) != ("mlp", "0.bias")]  # it feeds BatchNorm
    assert report.relative[..., judged].max() <= (1e-9 if dtype is torch.float64 else 1e-3)
    # A floor that explains everything would make the verdict worthless.
    assert report.allowed[..., judged].max() < (1e-6 if dtype is torch.float64 else 0.1)
    assert ("channels_last" in report.floors) == (kind == "convolution")  # dropout's masks depend on the format


def test_per_model_input_and_clipping():
    data = build_data(torch.float64, leading=(M,))
    report = compare(
        build_models(torch.float64), torch.optim.SGD, CONFIGS, data, F.cross_entropy, STEPS, range(M),
        shared_input=False, max_norm=0.1,
    )  # fmt: skip
    report.assert_equivalent()


def honest(models, configs, seeds):
    batch = ModelBatch(models, seeds=seeds)
    return batch, OptimizerFactory(torch.optim.Adam).create_optimizer(batch, configs)


def rate_off_by_a_hundredth(models, configs, seeds):
    return honest(models, [*CONFIGS[:2], {"lr": CONFIGS[2]["lr"] * 1.01}], seeds)


def small_leak(models, configs, seeds):
    batch, optimizer = honest(models, configs, seeds)

    def leak(*_):
        with torch.no_grad():
            batch.stacked_params["4.bias"][1] += 1e-6 * batch.stacked_params["4.bias"].grad[0]

    optimizer.register_step_post_hook(leak)
    return batch, optimizer


# What is planted -> the first step that goes wrong; of other-order nothing is wrong with a batch that is fed.
STEP = dict.fromkeys(FAULTS, 1) | {"stale-gradients": 2, "shared-optimizer-state": 2, "schedule-stepped-M-times": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found_at_their_step(fault, dtype):
    optimizer_cls = torch.optim.Adam if fault in ("stale-gradients", "other-masks") else torch.optim.SGD
    configs = [{**config, "momentum": 0.9} for config in CONFIGS] if optimizer_cls is torch.optim.SGD else CONFIGS
    recipe = BatchRecipe(optimizer_cls, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9))
    arguments = build_models(dtype), optimizer_cls, configs, build_data(dtype), F.cross_entropy, STEPS, range(M)
    report = compare(*arguments, build=plant(recipe, fault), scheduler=recipe.scheduler)
    assert not report.equivalent
    assert report.verdict.startswith(f"DIFFERENT: from step {STEP[fault]} on model ")
    with pytest.raises(AssertionError, match="DIFFERENT"):
        report.assert_equivalent()


@pytest.mark.parametrize(("fault", "model"), [(rate_off_by_a_hundredth, 2), (small_leak, 1)])
def test_a_small_fault_is_found_in_its_model(fault, model):
    arguments = build_models(torch.float64), torch.optim.Adam, CONFIGS, build_data(torch.float64), F.cross_entropy
    report = compare(*arguments, STEPS, range(M), build=fault)
    assert report.verdict.startswith(f"DIFFERENT: from step 1 on model {model} is not")


# ---------------------------------------------------------------- what is no number


def with_nan(data, steps):
    """Put a NaN into one row of the inputs of some batches."""
    return [(x.index_fill(0, torch.tensor([0]), torch.nan) if k in steps else x, y) for k, (x, y) in enumerate(data)]


@pytest.mark.parametrize("fault", [None, "mean-loss", "stale-gradients", "leaking-update"])
def test_models_that_are_no_numbers_alone(fault):
    def judged(steps):
        build = fault and plant(BatchRecipe(torch.optim.SGD), fault)
        data = with_nan(build_data(torch.float64), steps)
        models = build_models(torch.float64)
        return compare(models, torch.optim.SGD, CONFIGS, data, F.cross_entropy, 4, range(M), build=build)

    report = judged(range(4))  # from the start: nothing can be told
    assert report.unknown == list(range(M))
    assert not report.equivalent
    assert report.verdict.startswith("CANNOT TELL")
    with pytest.raises(AssertionError, match="CANNOT TELL"):
        report.assert_equivalent()
    assert "CANNOT TELL" in repr(report)

    report = judged([2])  # alike, later: the steps before judge
    assert report.lost.tolist() == [[False] * M] * 2 + [[True] * M] * 2
    assert report.equivalent == (fault is None)
    assert report.verdict.startswith("DIFFERENT: from step" if fault else "EQUIVALENT")
    assert fault or "until it diverges" in report.verdict


def test_one_model_of_three_diverges():
    configs = [{"lr": 0.01}, {"lr": 1e200}, {"lr": 0.02}]
    models, data = build_models(torch.float64, "convolution"), build_data(torch.float64, "convolution")
    report = compare(models, torch.optim.SGD, configs, data, F.cross_entropy, STEPS, range(M))
    report.assert_equivalent()
    assert report.lost.any(0).tolist() == [False, True, False]


@pytest.mark.parametrize("place", ["everywhere", "one number"])
def test_a_nan_on_one_side_only_is_a_difference(place):
    def build(models, configs, seeds):
        batch, optimizer = honest(models, configs, seeds)

        def spoil(*_):
            with torch.no_grad():
                weight = batch.stacked_params["4.weight"][1]
                (weight if place == "everywhere" else weight[0, :1]).fill_(torch.nan)

        optimizer.register_step_post_hook(spoil)
        return batch, optimizer

    arguments = build_models(torch.float64), torch.optim.Adam, CONFIGS, build_data(torch.float64), F.cross_entropy
    report = compare(*arguments, STEPS, range(M), build=build)
    assert report.verdict.startswith("DIFFERENT: from step 1 on model 1 is not")
    assert "'4.weight'" in report.verdict


# ---------------------------------------------------------------- other numbers than real ones in one precision


def only_real_parts(models, configs, seeds):
    batch = ModelBatch(models, seeds=seeds)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, configs)
    batch.stacked_params["w"].register_hook(lambda gradient: torch.complex(gradient.real, 0 * gradient.imag))
    return batch, optimizer


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(dtype):
    models = [Complex() for _ in range(M)]
    for model in models:
        model.w.data = model.w.data.to(dtype)
    data = [(x, x[:, :3].abs()) for x, _ in build_data(dtype.to_real())]
    arguments = models, torch.optim.SGD, {"lr": 0.1}, data, F.mse_loss, 4, range(M)
    report = compare(*arguments)
    report.assert_equivalent()
    assert report.allowed.max() < (1e-2 if dtype is torch.complex64 else 1e-6)
    assert compare(*arguments, build=only_real_parts).verdict.startswith("DIFFERENT: from step 1 on")


class CastsItself(nn.Module):
    """Has an autocast of its own."""

    def __init__(self, kind):
        super().__init__()
        self.inner = build_models(torch.float32, kind)[0]

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


@pytest.mark.parametrize("where", ["around", "inside", "by argument"])
@pytest.mark.parametrize("kind", ["mlp", "convolution"])
def test_under_autocast_its_rounding_is_no_difference_and_faults_are_one(kind, where):
    models = [CastsItself(kind) for _ in range(M)] if where == "inside" else build_models(torch.float32, kind)
    arguments = models, torch.optim.SGD, CONFIGS, build_data(torch.float32, kind), F.cross_entropy, STEPS, range(M)
    how = {"autocast": torch.bfloat16} if where == "by argument" else {}
    with torch.autocast("cpu", torch.bfloat16) if where == "around" else nullcontext():
        report = compare(*arguments, **how)
        stale = compare(*arguments, **how, build=plant(BatchRecipe(torch.optim.SGD), "stale-gradients"))
    report.assert_equivalent()
    assert report.tolerance == 1e-2
    assert {"last bit", "last bits down"} <= report.floors.keys()  # coarse numbers are moved both ways
    assert stale.verdict.startswith("DIFFERENT: from step 2 on")


# ---------------------------------------------------------------- habits


def test_targets_of_another_form_than_the_inputs():
    def mixup(outputs, targets):
        return targets[2] * F.cross_entropy(outputs, targets[0]) + (1 - targets[2]) * F.cross_entropy(
            outputs, targets[1]
        )

    models = [nn.Linear(5, 2).double() for _ in range(M)]
    y = torch.randint(2, (4,))
    x, shares = torch.randn(M, 4, 5).double(), torch.rand(M).double()
    each = [(x, (y.expand(M, 4), y.flip(0).expand(M, 4), shares))]
    arguments = models, torch.optim.SGD, {"lr": 0.1}
    compare(*arguments, each, mixup, 3, range(M), shared_input=False, shared_targets=False).assert_equivalent()
    models = [nn.Linear(5, M).double() for _ in range(M)]
    data = [(torch.randn(M, 5).double(), torch.randint(M, (M,))) for _ in range(2)]  # as many examples as models
    compare(
        models, torch.optim.SGD, {"lr": 0.1}, data, F.cross_entropy, 3, range(M), shared_targets=True
    ).assert_equivalent()


class Spectral(nn.Module):
    """Has a weight of four dimensions that must keep its memory format."""

    def __init__(self):
        super().__init__()
        self.w, self.layer = nn.Parameter(torch.randn(4, 4, 3, 2)), nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x + torch.view_as_complex(self.w).abs().sum())


def test_where_channels_last_cannot_be_it_is_no_source_of_noise():
    models = [Spectral().double() for _ in range(M)]
    report = compare(models, torch.optim.SGD, CONFIGS, build_data(torch.float64), F.cross_entropy, 3, range(M))
    report.assert_equivalent()
    assert list(report.floors) == ["last bit"]


class Writes(nn.Module):
    """Changes its inputs in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x.mul_(1.5))


def test_models_that_write_into_their_inputs():
    data = build_data(torch.float64)
    before = [x.clone() for x, _ in data]
    models = [Writes().double() for _ in range(M)]
    compare(models, torch.optim.SGD, CONFIGS, data, F.cross_entropy, STEPS, range(M)).assert_equivalent()
    assert all(torch.equal(x, old) for (x, _), old in zip(data, before, strict=True))


def test_it_changes_neither_the_models_nor_the_global_random_state():
    models, data = build_models(torch.float64), build_data(torch.float64)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    torch.manual_seed(3)
    compare(models, torch.optim.Adam, CONFIGS, data, F.cross_entropy, 3, range(M))
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))
    for model, states in zip(models, before, strict=True):
        assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())


def test_the_report_prints_displays_and_serializes():
    data = build_data(torch.float64)
    report = compare(build_models(torch.float64), torch.optim.Adam, {"lr": 0.01}, data, F.cross_entropy, 3, range(M))
    assert report.difference.shape == report.relative.shape == (3, M, len(report.parameters))
    assert report.loss_difference.shape == (3, M)
    assert "after step" in str(report)
    assert report._repr_html_().count("<tr>") == 4
    assert json.loads(json.dumps(report.to_dict()))["equivalent"] is True


def test_bad_input():
    models, data = build_models(torch.float64), build_data(torch.float64)
    with pytest.raises(ValueError, match="at least 1"):
        compare(models, torch.optim.SGD, CONFIGS, data, F.cross_entropy, 0)
    with pytest.raises(ValueError, match="Expected 3 configs"):
        compare(models, torch.optim.SGD, CONFIGS[:2], data, F.cross_entropy)
    with pytest.raises(ValueError, match="Expected 3 seeds"):
        compare(models, torch.optim.SGD, CONFIGS, data, F.cross_entropy, seeds=[1])
    with pytest.raises(TypeError, match="Expected configs as a dict"):
        compare(models, torch.optim.SGD, None, data, F.cross_entropy)
    with pytest.raises(ValueError, match="positive"):
        compare(models, torch.optim.SGD, CONFIGS, data, F.cross_entropy, max_norm=0.0)
    with pytest.raises(ValueError, match="of model 0 on the meta device"):
        compare([model.to("meta") for model in models], torch.optim.SGD, CONFIGS, data, F.cross_entropy)
    with pytest.raises(ValueError, match="models with parameters, got ReLU"):
        compare([nn.ReLU()] * M, torch.optim.SGD, CONFIGS, data, F.cross_entropy)
    with pytest.raises(TypeError, match="Expected a list of models, got one Sequential"):
        compare(models[0], torch.optim.SGD, CONFIGS, data, F.cross_entropy)
