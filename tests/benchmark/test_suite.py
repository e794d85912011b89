"""The suite measures what it says, with sides that train what they say."""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import trained_alone
from torch.nn.functional import cross_entropy

from mbkit.benchmark import __main__ as terminal
from mbkit.benchmark import suite
from mbkit.benchmark.baselines import BASELINES, LOOP, LOOP_AS_IT_IS
from mbkit.benchmark.cases import CASES, NETWORKS, Case, cases_of
from mbkit.benchmark.suite import SuiteResult, run_suite
from mbkit.common.process import Worker
from mbkit.figures import speed

RECORDED = sorted((Path(__file__).parents[2] / "data/benchmarks").glob("*/*.json"))


class Here:
    """A worker that is no process, for tests that need none."""

    ended = False

    def ask(self, what, *args, patience):
        if isinstance(what, str):
            return getattr(self.kept, what)(*args)
        self.kept = what(*args)
        return None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(suite, "SECONDS", 0.0)
    monkeypatch.setattr(suite, "Worker", Here)


@pytest.fixture(scope="module")
def worker():
    with Worker() as worker:
        yield worker


# ------------------------------------------------------------------ the sides

# Half a minute of compilation; two more processes.
SLOW = {(name, "LeNet5"): pytest.mark.slow for name in ("mbkit compiled", "process pool")}
SIDES = [
    pytest.param(name, network, marks=SLOW.get((name, network), ()))
    for name in BASELINES if name != LOOP_AS_IT_IS  # the same function
    for network in ("MLP", "LeNet5")
]  # fmt: skip


@pytest.mark.parametrize(("name", "network"), SIDES)
def test_every_side_trains_the_models_that_it_is_given(name, network, worker):
    """After three steps of Adam at one rate each side's parameters are those of plain PyTorch."""
    pytest.importorskip({"modelbatch": "modelbatch", "JAX jit(vmap)": "jax"}.get(name, "torch"))
    case, configs = Case(network, 3, 8), [{"lr": 0.01}] * 3
    batch, starts = case.data(), case.models()
    alone = trained_alone(case.models(), [batch] * 3, False, cross_entropy, None, range(3), torch.optim.Adam, configs)
    worker.ask(torch.set_num_threads, 2 if name == "process pool" else 1)
    worker.ask(BASELINES[name], case.models(), torch.optim.Adam, configs, range(3))
    worker.ask("run", [batch] * 3)
    assert worker.ask("seconds").shape in ((3, 1), (3, 3))
    for m, (model, start) in enumerate(zip(alone, starts, strict=True)):
        for (parameter, value), before in zip(model.named_parameters(), start.parameters(), strict=True):
            # In float32, where Adam divides gradients by their own size: nearly zero ones are all rounding.
            moved = (value - before).norm()
            assert (worker.ask("read", m, parameter) - value).norm() < 0.01 * moved


def test_what_a_side_cannot_train_is_an_error_that_says_why(worker):
    able, said = {}, []
    for network in NETWORKS:
        case = Case(network, 2, 4)
        for name in ("modelbatch", "naive vmap", "JAX jit(vmap)"):
            try:
                worker.ask(BASELINES[name], case.models(), torch.optim.Adam, case.configs(), range(2))
                worker.ask("run", [case.data()])
                able.setdefault(name, set()).add(network)
            except Exception as error:
                said.append(str(error))
    assert able["naive vmap"] == {"MLP", "LeNet5", "GPT"}
    reasons = "in JAX|is not installed|edited in place|BatchNorm|implemented for aten::lstm|call Tensor.requires_grad_"
    assert all(re.search(reasons, each) for each in said)


def test_malloc_is_set_for_all_sides_but_one_loop(here, monkeypatch):
    asked = []
    monkeypatch.setattr(suite, "tune_malloc", lambda: asked.append(1))
    for side, count in ((LOOP_AS_IT_IS, 0), (LOOP, 1), ("naive vmap", 2), ("mbkit", 3)):
        run_suite([Case("MLP", 2, 4)], sides=[side], progress=False)
        assert len(asked) == count


# ------------------------------------------------------------------ the suite


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> SuiteResult:
    cases = [Case("MLP", 2, 8), Case("MLP", 16, 8), Case("LSTM", 8, 4)]
    file = tmp_path_factory.mktemp("suite") / "new" / "suite.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "SECONDS", 0.02)
        result = run_suite(cases, sides=[LOOP_AS_IT_IS, LOOP, "naive vmap", "mbkit"], progress=False, save=file)
    assert str(SuiteResult.load(file)) == str(result)
    assert json.loads(file.read_text())["rows"] == result.rows
    return result


def test_a_side_that_cannot_train_a_network_has_a_dash_and_a_reason(result):
    assert sorted(result.rows[-1]["seconds"]) == ["mbkit", "sequential", "sequential, malloc set"]
    assert result.rows[-1]["missing"].keys() == {"naive vmap"}
    assert result.table()[-1][5] == "-"
    assert "naive vmap: Batching rule not implemented" in str(result)


def test_ratios_are_those_of_medians_a_model_and_step(result):
    row = result.rows[1]
    medians = {side: statistics.median(times) for side, times in row["seconds"].items()}
    assert result.ratio(row, "mbkit") == pytest.approx(medians[LOOP] / medians["mbkit"], rel=1e-9)
    assert f"{medians[LOOP_AS_IT_IS] / medians[LOOP]:.2f} x" == result.table()[2][4]  # what the setting alone gives
    assert row["how"]
    assert all(t > 0 for times in row["seconds"].values() for t in times)
    # In a file from before there were two loops the one that there is takes its place.
    old = {**row, "seconds": {side: times for side, times in row["seconds"].items() if side != LOOP}}
    assert result.ratio(old, "mbkit") == pytest.approx(medians[LOOP_AS_IT_IS] / medians["mbkit"], rel=1e-9)


def test_costs_are_kept_for_each_side(result):
    for row in result.rows:
        for side, costs in row["costs"].items():
            assert side in row["seconds"]
            assert min(costs["models"], costs["build"], costs["first"]) > 0
            assert costs["memory"] is None or costs["memory"] >= 0
    assert [line[:3] for line in result.costs()[1:]] == [line[:3] for line in result.table()[1:]]


def test_it_is_drawn(result):
    mlp, lstm = speed.speedups(result).axes
    assert [label.get_text() for label in mlp.get_yticklabels()] == [LOOP_AS_IT_IS, "naive vmap", "mbkit"]
    sides = ("sequential", "naive vmap", "mbkit")
    assert [bar.get_width() for bar in mlp.patches] == pytest.approx([result.ratio(result.rows[1], s) for s in sides])
    assert [bar.get_width() for bar in lstm.patches][1] == 0
    assert [text.get_text() for text in lstm.texts][1] == "–"
    axes = speed.growth(result).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    expected = [1e3 * result.timing(row, "mbkit").median for row in result.rows[:2]]
    assert list(drawn["a step, mbkit"]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="several numbers of models"):
        speed.growth(SuiteResult(result.machine, result.rows[:1]))


def test_after_its_minutes_no_case_is_begun(here, monkeypatch):
    clock, measure = [0.0], suite._measure

    def measured(*arguments):
        clock[0] += 59.0  # seconds
        return measure(*arguments)

    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter))
    monkeypatch.setattr(suite, "_measure", measured)
    assert len(run_suite([Case("MLP", 2, 4)] * 4, sides=[LOOP], minutes=1, progress=False).rows) == 2


@pytest.mark.cuda
def test_all_sides_but_jax_measure_on_a_gpu():
    result = run_suite([Case("MLP", 4, 8, "cuda"), Case("LeNet5", 2, 8, "cuda")], progress=False)
    for row in result.rows:
        assert row["missing"].keys() <= {"JAX jit(vmap)", "modelbatch"}, row["missing"]
        assert row["costs"]["mbkit"]["memory"] > 0


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="Expected sides out of sequential"):
        run_suite(CASES[:1], sides=["tortoise"])


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_recorded_files_load_and_can_be_drawn(file, capsys):
    terminal.main(["show", str(file)])
    result = SuiteResult.load(file)
    assert capsys.readouterr().out == f"{result}\n"
    assert all(result.ratio(row, "mbkit") for row in result.rows)
    speed.speedups(result)
    speed.growth(result)


def test_the_terminal_measures_saves_and_draws(capsys, here, tmp_path):
    file, bars, curves = (tmp_path / name for name in ("suite.json", "bars.png", "curves.png"))
    terminal.main(["scale", str(file), "--models", "2", "4", "--threads", "1", "--curves", str(curves),
                   "--figure", str(bars)])  # fmt: skip
    result = SuiteResult.load(file)
    assert [(row["network"], row["num_models"]) for row in result.rows] == [("MLP", 2), ("MLP", 4)]
    assert result.rows[0]["seconds"].keys() == {LOOP, "mbkit"}
    assert result.machine["threads"] == 1
    assert "What mbkit takes" in capsys.readouterr().out
    assert bars.read_bytes()[:4] == curves.read_bytes()[:4] == b"\x89PNG"


def test_cases_of_all_sizes():
    assert cases_of(["MLP"], [3], [4, 5]) == [Case("MLP", 3, 4), Case("MLP", 3, 5)]


@pytest.mark.parametrize("name", ["ResNet", "GPT", "LSTM", "PINN"])
def test_networks_learn_one_batch(name):
    torch.manual_seed(0)
    case = Case(name, 1, 8)
    (x, y), (model,) = case.data(), case.models()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = getattr(model, "loss_fn", cross_entropy)(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
