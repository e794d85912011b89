"""diagnose: every planted fault is found by its own name, with its evidence; without a fault nobody is named."""

import functools
import io
import itertools
import json
import os
import random
import time

import pytest
import torch
import torch.nn.functional as F
from diagnosis_cases import KINDS, OPTIMIZERS, RATES, Bare, Complex, M, case, schedule
from torch import nn

from mbkit import LeNet5, TinyMLP, diagnose
from mbkit.batch.context import context_of
from mbkit.verify.faults import FAULTS, StaleGradientOptimizer, plant
from mbkit.verify.subject import BatchRecipe, BatchSubject
from mbkit.vmap import Streams

# Of each fault in each setting; where it is 1, a pair of faults is drawn in one setting only. With MBKIT_DRAWS=20
# the slow tests of this file take about two hours of one core.
DRAWS = int(os.environ.get("MBKIT_DRAWS", "1"))
GRID = list(itertools.product(KINDS, OPTIMIZERS, RATES))
# In eval mode nothing is drawn, so there are no masks that could be others.
PAIRS = [pair for pair in itertools.combinations(FAULTS, 2) if pair != ("other-masks", "other-mode")]


def found(names, setting, seed):
    kind, optimizer_cls, rate = setting
    arguments, keywords, recipe = case(kind, optimizer_cls, rate, seed, max_norm=(0.5, None)[seed % 2])
    return diagnose(*arguments, **keywords, build=plant(recipe, *names, seed=seed))


def setting_of(name):
    """One of the grid's settings for each fault: among them all optimizers, architectures and learning rates."""
    return GRID[list(FAULTS).index(name) * 5 % len(GRID)]


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found_by_its_own_name(name):
    report = found([name], setting_of(name), seed=1)
    assert report.guilty == [name]
    unmeasured = [other for other, finding in report.findings.items() if finding.verdict == "not measured"]
    assert unmeasured == (["other-masks"] if name == "other-mode" else [])  # in eval mode nothing is drawn
    finding = report.findings[name]
    assert finding.size > 1e-6
    assert finding.step is not None
    if name != "other-order":  # which is one for all models and parameters
        assert finding.model in range(M)
        assert finding.parameter


@pytest.mark.parametrize("setting", GRID[::7], ids=str)
def test_without_a_fault_nobody_is_guilty(setting):
    report = found([], setting, seed=1)
    assert report.guilty == []
    assert report.findings["rounding"].verdict in ("all there is", "cleared")  # cleared where the bits are the same
    assert all(finding.verdict == "cleared" for name, finding in report.findings.items() if name != "rounding")
    assert report.conclusion.startswith("The batch is its models alone")


@pytest.mark.parametrize("pair", random.Random(0).sample(PAIRS, 4), ids="+".join)
def test_a_pair_of_faults_is_found(pair):
    assert set(found(pair, setting_of(pair[0]), seed=PAIRS.index(pair)).guilty) == set(pair)


@pytest.mark.slow
@pytest.mark.parametrize("setting", GRID, ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_in_every_draw(name, setting):
    missed = {seed: report.guilty for seed in range(DRAWS) if (report := found([name], setting, seed)).guilty != [name]}
    assert not missed


@pytest.mark.slow
def test_no_false_alarm_in_two_hundred_draws():
    draws = zip(range(204), itertools.cycle(GRID), strict=False)
    alarms = {seed: report.guilty for seed, setting in draws if (report := found([], setting, seed)).guilty}
    assert not alarms


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("number", range(4 if DRAWS > 1 else 1))
def test_all_pairs(pair, number):
    settings = list(itertools.product(KINDS, OPTIMIZERS))
    kind, optimizer_cls = settings[(number + PAIRS.index(pair)) % len(settings)]
    for seed in range(-(-DRAWS // 7)):
        report = found(pair, (kind, optimizer_cls, 0.01), seed)
        if set(report.guilty) != set(pair):
            # Both hit one parameter: its gradient is then another model's, right or wrong (see faults.py).
            assert pair == ("wrong-gradient", "shared-memory")
            wrong = found(["wrong-gradient"], (kind, optimizer_cls, 0.01), seed).findings["wrong-gradient"]
            assert report.findings["shared-memory"].parameter == wrong.parameter


# ---------------------------------------------------------------- evidence


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 4), nn.Linear(12, 3)

    def forward(self, x):
        return self.layer(self.embedding(x.long()).flatten(1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_another_order_of_whole_numbers_and_of_batches_of_other_sizes(dtype):
    """The last batch is smaller; the same examples with other targets are another order, too."""
    torch.manual_seed(0)
    x, y = torch.randint(2, (16, 3)).to(dtype), torch.randint(3, (16,))
    data = [(x, y), (x, (y + 1) % 3), (x, (y + 2) % 3), (x[:12], y[:12])]
    (_, optimizer_cls, configs, *_), keywords, recipe = case("mlp", torch.optim.SGD)
    models = [Embeds() for _ in range(M)]
    for seed in (0, 1):
        build = plant(recipe, "other-order", seed=seed)
        report = diagnose(models, optimizer_cls, configs, data, F.cross_entropy, **keywords, build=build)
        assert report.guilty == ["other-order"]


def test_the_evidence_names_the_place():
    arguments, keywords, recipe = case("mlp", torch.optim.SGD)

    def build(models, configs, seeds):
        subject = recipe(models, configs, seeds)
        weight = subject.batch.stacked_params["4.weight"]

        def double(gradient):
            return torch.cat([gradient[:2], 2 * gradient[2:]])  # of model 2

        weight.register_hook(double)
        return subject

    report = diagnose(*arguments, **keywords, build=build)
    finding = report.findings["wrong-gradient"]
    assert report.guilty == ["wrong-gradient"]
    assert (finding.model, finding.parameter, finding.step) == (2, "4.weight", 1)
    assert finding.size == pytest.approx(0.5)  # of the longer one
    assert "4.weight of model 2" in finding.evidence


def test_masks_that_repeat_are_other_masks():
    arguments, keywords, recipe = case("mlp", torch.optim.SGD)

    def build(models, configs, seeds):
        subject = recipe(models, configs, seeds)

        def again(*_):
            context_of(subject.batch).streams = Streams(seeds)

        subject.optimizer.register_step_post_hook(again)
        return subject

    report = diagnose(*arguments, **keywords, build=build)
    assert report.guilty == ["other-masks"]
    assert report.findings["other-masks"].step == 2


class Noisy(nn.Module):
    """Draws what nothing can switch off."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x + 0.3 * torch.randn_like(x))


@pytest.mark.parametrize("names", [[], ["other-masks"]])
def test_random_numbers_that_cannot_be_switched_off(names):
    (_, optimizer_cls, configs, *rest), keywords, recipe = case("mlp")
    models = [Noisy() for _ in range(M)]
    report = diagnose(models, optimizer_cls, configs, *rest, **keywords, build=plant(recipe, *names))
    assert report.guilty == names
    assert report.findings["wrong-gradient"].verdict == ("not measured" if names else "cleared")


def test_the_published_optimizer_is_found_out():
    arguments, keywords, _ = case("mlp", dropout=0.0)
    keywords |= {"max_norm": None, "scheduler": None}

    def build(models, configs, seeds):
        batch = BatchRecipe(torch.optim.Adam)(models, configs, seeds).batch
        return BatchSubject(batch, StaleGradientOptimizer(batch, torch.optim.Adam, configs))

    assert diagnose(*arguments, **keywords, build=build).guilty == ["stale-gradients"]


def test_a_difference_that_is_no_suspects_is_not_pinned_on_one():
    arguments, keywords, recipe = case("mlp", torch.optim.SGD)

    def build(models, configs, seeds):
        subject = recipe(models, configs, seeds)

        def push(*_):
            subject.batch.stacked_params["4.bias"].data.add_(0.01)

        subject.optimizer.register_step_post_hook(push)
        return subject

    report = diagnose(*arguments, **keywords, build=build)
    assert report.guilty == []
    assert "none of the suspects" in report.conclusion
    assert report.findings["rounding"].verdict == "cleared"


# ---------------------------------------------------------------- from outside


def bare(recipe=Bare, **changes):
    arguments, keywords, _ = case("convolution", torch.optim.SGD, **{"dropout": 0.0, **changes})
    keywords |= {"max_norm": None, "scheduler": None}
    return diagnose(*arguments, **keywords, build=recipe)


def test_a_bare_torch_func_loop():
    report = bare()
    assert report.guilty == []
    assert report.equivalence.equivalent
    assert bare(dropout=0.3).guilty == ["other-masks"]  # vmap draws masks of its own


class AddsUp(Bare):
    kept = None

    def change_gradients(self):
        if self.kept:
            self.grads = {name: g + self.kept[name] for name, g in self.grads.items()}
        self.kept = self.grads


class OneMomentumForAll(Bare):
    def change_gradients(self):
        self.momenta = {name: m.mean(0).expand_as(m).clone() for name, m in self.momenta.items()}


class FirstRateForAll(Bare):
    def __init__(self, models, configs, seeds):
        super().__init__(models, configs, seeds)
        self.rates[:] = self.rates[0].clone()


class OneListForAll(Bare):
    def optimizer_state(self, m):
        return super().optimizer_state(0)


class ClippedTogether(Bare):
    def change_gradients(self):
        norm = torch.cat([g.flatten() for g in self.grads.values()]).norm()
        self.grads = {name: g * (0.1 / norm).clamp(max=1) for name, g in self.grads.items()}


@pytest.mark.parametrize(
    ("loop", "name"),
    [
        (AddsUp, "stale-gradients"),
        (OneMomentumForAll, "shared-optimizer-state"),
        (FirstRateForAll, "setting-of-model-0"),
        (OneListForAll, "shared-memory"),
        (ClippedTogether, "clipped-across-models"),
    ],
)
def test_a_bare_loop_that_goes_wrong_by_itself(loop, name):
    assert bare(loop).guilty == [name]


def test_a_dropout_rate_of_model_0():
    arguments, keywords, _ = case("mlp", torch.optim.SGD)
    keywords |= {"max_norm": None, "scheduler": None}
    for model, slope in zip(arguments[0], (0.1, 0.2, 0.3), strict=True):
        model[2] = nn.LeakyReLU(slope)
        model[1], model[3] = nn.Identity(), nn.Identity()
    report = diagnose(*arguments, **keywords, build=Bare)  # which calls model 0 for all
    assert report.guilty == ["setting-of-model-0"]
    assert report.findings["setting-of-model-0"].parameter == "2.negative_slope"


class TestTheLibraryModelbatch:
    """What its 0.1.0 does right, and what it does wrong."""

    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("modelbatch")
        from diagnosis_cases import Library

        self.library = Library

    def diagnose(self, dropout=0.0, scheduler=None, **settings):
        arguments, keywords, _ = case("convolution", torch.optim.Adam, dropout=dropout)
        keywords |= {"max_norm": None, "scheduler": scheduler}
        return diagnose(*arguments, **keywords, build=functools.partial(self.library, **settings)).guilty

    def test_without_random_layers_it_is_right(self):
        assert self.diagnose() == []

    def test_its_masks_are_others(self):
        assert self.diagnose(dropout=0.3) == ["other-masks"]

    def test_its_mean_is_over_the_models(self):
        assert self.diagnose(reduction="mean") == ["mean-loss"]

    def test_each_of_its_schedulers_moves_all_models(self):
        assert self.diagnose(scheduler=schedule, schedulers=True) == ["schedule-stepped-M-times"]


# ---------------------------------------------------------------- what is no number, complex, coarse


def spoilt(data, rows):
    return [(x.index_fill(0, torch.tensor(rows), torch.nan), y) for x, y in data]


@pytest.mark.parametrize("names", [[], ["mean-loss"], ["stale-gradients"], ["leaking-update"], ["other-order"]])
def test_examples_that_are_no_numbers_accuse_nobody_and_hide_nobody(names):
    (*arguments, data, loss_fn), keywords, recipe = case("mlp")
    report = diagnose(*arguments, spoilt(data, [0, 3]), loss_fn, **keywords, build=plant(recipe, *names))
    assert report.guilty == names
    assert report.equivalence.unknown == list(range(M))
    assert names or report.conclusion.startswith("Whether the batch is its models alone cannot be told")
    assert report.findings["rounding"].verdict == "not measured"


@pytest.mark.parametrize("names", [[], ["mean-loss"], ["stale-gradients"], ["leaking-update"]])
@pytest.mark.parametrize("way", ["all data", "loss"])
def test_where_no_gradient_is_a_number_none_is_judged(way, names):
    (*arguments, data, loss_fn), keywords, recipe = case("mlp")
    if way == "all data":
        data = spoilt(data, range(16))
    else:
        loss_fn = lambda outputs, targets: F.cross_entropy(outputs, targets) * torch.inf  # noqa: E731
    report = diagnose(*arguments, data, loss_fn, **keywords, build=plant(recipe, *names))
    assert report.guilty == []
    assert report.findings["wrong-gradient"].verdict == "not measured"
    assert report.findings["other-order"].verdict == report.findings["shared-memory"].verdict == "cleared"
    assert "cannot be told" in report.conclusion
    assert str(report).count("\n?") >= 8


@pytest.mark.parametrize("name", [None, *FAULTS])
def test_complex_parameters(name):
    (_, optimizer_cls, configs, *rest), keywords, recipe = case("mlp", torch.optim.SGD)
    names = [name] if name and name not in ("other-masks", "other-mode") else []  # nothing is random here
    report = diagnose([Complex() for _ in range(M)], optimizer_cls, configs, *rest, **keywords,
                      build=plant(recipe, *names))  # fmt: skip
    assert report.guilty == names


def test_imaginary_parts_that_are_not_trained():
    (_, optimizer_cls, configs, *rest), keywords, recipe = case("mlp", torch.optim.SGD)

    def build(models, configs, seeds):
        subject = recipe(models, configs, seeds)
        subject.batch.stacked_params["w"].register_hook(lambda g: torch.complex(g.real, 0 * g.imag))
        return subject

    report = diagnose([Complex() for _ in range(M)], optimizer_cls, configs, *rest, **keywords, build=build)
    assert report.guilty == ["wrong-gradient"]


@pytest.mark.parametrize("dtype", [torch.float64, None])
@pytest.mark.parametrize("names", [[], ["mean-loss"], ["stale-gradients"], ["wrong-gradient"], ["other-weights"]])
def test_under_autocast(names, dtype):
    arguments, keywords, recipe = case("convolution", torch.optim.SGD, dropout=0.0, max_norm=None)
    keywords["autocast"] = torch.bfloat16
    report = diagnose(*arguments, **keywords, dtype=dtype, build=plant(recipe, *names))
    assert report.guilty == names
    assert report.equivalence.tolerance == 1e-2
    assert names or report.conclusion.startswith("The batch is its models alone")


# ---------------------------------------------------------------- the report, speed and bad input


def test_a_batch_and_its_optimizer_are_enough_and_one_step_too():
    arguments, keywords, recipe = case("mlp", torch.optim.SGD)

    def build(models, configs, seeds):
        subject = recipe(models, configs, seeds)
        return subject.batch, subject.optimizer

    for steps in (1, 4):
        report = diagnose(*arguments, **{**keywords, "steps": steps}, build=build)
        assert report.guilty == []
        assert report.equivalence.equivalent
        assert len(report.equivalence.relative) == steps


def test_the_report_prints_displays_and_serializes():
    report = found(["stale-gradients", "mean-loss"], GRID[0], seed=1)
    lines = str(report).splitlines()
    assert lines[0] == report.conclusion
    assert FAULTS["stale-gradients"] in report.conclusion
    assert FAULTS["mean-loss"] in report.conclusion
    assert [line.split()[1] for line in lines[3:5]] == ["stale-gradients", "mean-loss"]
    assert len(lines) == 3 + len(FAULTS) + 1
    assert sum(line.startswith("✓") for line in lines) == len(FAULTS) - 1
    page = report._repr_html_()
    assert page.count("<tr>") == 2 + len(FAULTS)
    assert "data:image/png;base64," in page
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["guilty"] == ["stale-gradients", "mean-loss"]
    assert saved["findings"]["stale-gradients"]["step"] == 2
    assert len(report.plot().axes) == M + 1


def test_it_prints_wherever_the_terminal_has_no_such_signs(monkeypatch):
    report = found(["mean-loss"], GRID[0], seed=1)
    for encoding, mark in {"utf-8": "✗", "cp1252": "x", "ascii": "x"}.items():
        written = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
            print(report, flush=True)
            lines = written.getvalue().decode(encoding).splitlines()
        assert lines[3].split()[:2] == [mark, "mean-loss"]
    assert "✗" in report._repr_html_()


def test_the_map_shows_which_model_is_off_and_by_how_much():
    report = found(["leaking-update"], GRID[0], seed=1)
    sink = report.findings["leaking-update"].model
    panels = report.plot().axes[:M]
    titles = [axes.get_title() for axes in panels]
    assert [title.endswith("rounding") for title in titles] == [m != sink for m in range(M)]
    for m, axes in enumerate(panels):
        shown = axes.images[0].get_array()  # parameters x steps
        assert shown.shape == (len(report.equivalence.parameters), 4)
        assert 10 ** shown.max() == pytest.approx(report.equivalence.relative[:, m].max().item())


def test_it_changes_neither_the_models_nor_the_random_state():
    arguments, keywords, recipe = case()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in arguments[0]]
    torch.manual_seed(3)
    diagnose(*arguments, **keywords, build=plant(recipe, "other-weights"))
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))
    for model, states in zip(arguments[0], before, strict=True):
        assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())


def test_one_model_and_input_of_each_models_own():
    (models, optimizer_cls, configs, *rest), keywords, _ = case()
    assert diagnose(models[:1], optimizer_cls, configs[:1], *rest, **{**keywords, "seeds": [1]}).guilty == []
    data = [(torch.randn(M, 16, 6), torch.randint(3, (M, 16))) for _ in range(4)]
    own = diagnose(models, optimizer_cls, configs, data, F.cross_entropy, **keywords, shared_input=False)
    assert own.guilty == []


def test_the_demos_models_take_less_than_two_seconds():
    models = [TinyMLP() for _ in range(3)]
    data = [(torch.randn(20, 8), torch.randint(2, (20,))) for _ in range(5)]
    configs = [{"lr": rate} for rate in (0.001, 0.01, 0.1)]
    for _ in range(2):  # the first call imports what vmap needs
        start = time.process_time()  # of work, on one thread, as machines are shared
        diagnose(models, torch.optim.Adam, configs, data, F.cross_entropy, seeds=range(3))
        seconds = time.process_time() - start
    assert seconds < 2


@pytest.mark.slow
def test_sixteen_lenets_take_less_than_a_minute():
    models = [LeNet5(dropout=0.2) for _ in range(16)]
    data = [(torch.randn(128, 3, 32, 32), torch.randint(10, (128,))) for _ in range(4)]
    configs = [{"lr": 0.001 * (m + 1)} for m in range(16)]
    start = time.process_time()
    report = diagnose(models, torch.optim.Adam, configs, data, F.cross_entropy, seeds=range(16))
    assert time.process_time() - start < 60
    assert report.guilty == []


def test_bad_input():
    arguments, keywords, recipe = case()
    with pytest.raises(ValueError, match=r"names of faults, got 'mean'"):
        plant(recipe, "mean")
    with pytest.raises(ValueError, match="with a schedule"):
        diagnose(*arguments, **keywords, build=plant(BatchRecipe(torch.optim.Adam), "schedule-stepped-M-times"))
    with pytest.raises(TypeError, match="Expected configs as a dict"):
        diagnose(*arguments[:2], None, *arguments[3:])
    with pytest.raises(ValueError, match="models with parameters, got ReLU"):
        diagnose([nn.ReLU()] * 3, *arguments[1:])
    with pytest.raises(ValueError, match="Expected 3 configs"):
        diagnose(*arguments[:2], [{"lr": 0.1}], *arguments[3:])
