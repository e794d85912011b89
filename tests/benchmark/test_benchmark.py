"""The benchmark trains what it says, times what it says, and does its sums right."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import close
from torch import nn
from torch.nn.functional import cross_entropy

from mbkit.benchmark import baselines
from mbkit.benchmark import lenet as benchmark
from mbkit.benchmark.lenet import BenchmarkResult, learning_rate_grid, run_benchmark
from mbkit.benchmark.result import Timing
from mbkit.common import machine
from mbkit.common.machine import describe_machine, measure_peak_memory
from mbkit.data import load_digits
from mbkit.training import step as stepping
from mbkit.training.sequential import LoneTrainer


class Small(nn.Module):
    """A classifier that draws: dropout's masks show whether each model keeps its own."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x):
        return self.layer(nn.functional.dropout(x.flatten(1), 0.5, self.training))


@pytest.fixture(scope="module")
def digits():
    return load_digits().subset(200, 50)


def run(digits, **changes):
    options = {"num_models": 4, "model": Small, "batch_size": 64, "epochs": 2, "warmup": 2, "dtype": torch.float64}
    return run_benchmark(digits, **(options | changes))


@pytest.fixture
def trained(monkeypatch):
    """The models of both sides, as they are after training."""
    models, evaluate = [], benchmark.evaluate
    monkeypatch.setattr(benchmark, "evaluate", lambda each, tests: (models.append(each), evaluate(each, tests))[1])
    return models


@pytest.fixture(scope="module")
def result(digits):
    return run(digits)


def test_both_sides_are_the_loop_written_by_hand(digits, trained):
    result = run(digits)
    for m, (rate, seed) in enumerate(zip(result.learning_rates, result.seeds, strict=True)):
        torch.manual_seed(seed)
        model = Small(10).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        batches = digits.batches(64, dtype=torch.float64)
        torch.manual_seed(seed)
        for _ in range(2):
            for x, y in batches:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
        for models in trained:
            close(models[m].layer.weight, model.layer.weight)
        model.eval()
        x, y = next(iter(digits.test_batches(dtype=torch.float64)))
        right = (model(x).argmax(1) == y).double().mean().item()
        assert result.alone_accuracy[m].item() == result.batched_accuracy[m].item() == right
    assert result.parameter_difference.shape == (4,)
    assert result.parameter_difference.max() < 1e-10  # of parameters of about 0.1, after 8 steps of at most 0.01


def test_only_full_batches_after_the_warmup_are_timed(result):
    assert result.setup["steps"] == 8  # 64 + 64 + 64 + 8 images, twice
    assert result.batched_seconds.shape == (4,)
    assert result.alone_seconds.shape == (4, 4)


def test_sides_take_turns_and_wait_for_the_device(digits, monkeypatch):
    calls = []
    monkeypatch.setattr(baselines, "synchronize", lambda device: calls.append("wait"))
    for room, name in ((LoneTrainer, "update"), (stepping, "make_update")):
        original = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *args, f=original, n=name: (calls.append(n), f(*args))[1])
    run(digits, num_models=2, epochs=10, max_steps=25, warmup=3)
    assert calls[::3] == calls[2::3] == ["wait"] * (len(calls) // 3)  # before the clock starts and before it stops
    sides = calls[1::3][2:]  # the first two are for what is loaded once
    alone, batched = ["update"] * 2, ["make_update"]
    assert (
        sides
        == alone * 3 + batched * 3 + batched * 10 + alone * 10 + alone * 10 + batched * 10 + batched * 2 + alone * 2
    )


def test_the_clock_covers_the_step_alone(digits, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(baselines.time, "perf_counter", lambda: now[0])

    def taking(seconds, original):
        def step(*args):
            now[0] += seconds
            return original(*args)

        return step

    monkeypatch.setattr(LoneTrainer, "update", taking(3.0, LoneTrainer.update))
    monkeypatch.setattr(stepping, "make_update", taking(4.0, stepping.make_update))
    original = benchmark.walk
    monkeypatch.setattr(benchmark, "walk", lambda *args: (taking(100.0, lambda p: p)(p) for p in original(*args)))
    result = run(digits, num_models=2)
    assert (result.alone.median, result.batched.median) == (3.0, 2.0)  # a model and step
    assert result.speedup == 1.5


def test_nothing_outside_is_touched(digits):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(digits, num_models=2, max_steps=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_hyperparameters_reach_both_sides(digits, trained):
    options = {"optimizer_cls": torch.optim.SGD, "hyperparameters": {"momentum": [0.0, 0.9], "weight_decay": 0.1}}
    result = run(digits, num_models=2, learning_rates=[1e-2, 1e-2], seeds=[0, 0], **options)
    assert result.parameter_difference.max() < 1e-10
    for models in trained:  # of one seed and one rate
        assert (models[0].layer.weight - models[1].layer.weight).abs().max() > 1e-3
    assert result.setup["hyperparameters"] == {"momentum": [0.0, 0.9], "weight_decay": [0.1, 0.1]}


# ------------------------------------------------------------------ sums and files


@pytest.fixture
def known():
    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    return BenchmarkResult(
        learning_rates=[0.1, 1.0],
        seeds=[3, 4],
        batched_seconds=tensor([0.002, 0.004, 0.030]),
        alone_seconds=tensor([[0.001, 0.003], [0.004, 0.004], [0.005, 0.007]]),
        batched_accuracy=tensor([0.6, 0.1]),
        alone_accuracy=tensor([0.5, 0.1]),
        parameter_difference=tensor([1e-3, math.nan]),
        batched_memory=30_000_000,
        alone_memory=None,
        setup={
            "model": "Net",
            "parameters": 1234,
            "optimizer": "SGD",
            "hyperparameters": {},
            "batch_size": 8,
            "steps": 5,
            "warmup": 2,
            "dtype": "float32",
            "dataset": "digits",
            "dataset_note": "Small <images>.",
            "timing": "in turns",
        },
        machine={"device": "cpu (abacus)", "threads": 1, "cores": 2, "torch": "2", "mbkit": "0"},
    )


def test_medians_quartiles_and_their_ratio(known):
    assert known.batched == Timing(median=0.002, low=0.0015, high=0.0085)  # half of 4, of 3 and of 17 ms
    assert known.alone == Timing(median=0.004, low=0.003, high=0.005)
    assert known.speedup == 2.0


def test_it_prints_what_it_measured(known):
    text = str(known)
    for part in (
        "2 x Net (1,234 parameters each) on digits",
        "cpu (abacus), 1 of 2 threads",
        "4 (3 to 5)",
        "2 (1.5 to 8.5)",
        "2.00",
        "not measured",
        "30",
        "60.0 %",
        "1.0e-03",
        "nan",
        "3 steps timed, after 2 for warm-up",
        "In float32 rounding grows",
    ):
        assert part in text
    assert "Small &lt;images&gt;." in known._repr_html_()


def test_the_grid():
    rates, seeds = learning_rate_grid(8, 1e-4, 1e-1)
    assert rates == pytest.approx([1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2, 1e-1, 1e-1])
    assert seeds == [0, 1] * 4
    assert learning_rate_grid(2, 1e-4, 1e-2) == (pytest.approx([1e-4, 1e-2]), [0, 0])
    assert learning_rate_grid(3, 1e-4, 1e-2)[1] == [0, 0, 0]
    assert len(learning_rate_grid(1)[0]) == 1


PEAK = """
import torch
from mbkit.common.machine import measure_peak_memory

with measure_peak_memory(torch.device("cpu")) as peak:
    for _ in range(3):  # one after the other: freed in between
        torch.ones(10_000_000)
print(peak.bytes)
"""


def test_peak_memory_rises_by_what_is_allocated():
    """In a process of its own: where fit has run, malloc keeps what is freed (see machine.tune_malloc)."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    if run.stdout.strip() == "None":
        pytest.skip("no /proc/self/clear_refs that can be written here")
    assert 38e6 <= int(run.stdout) < 60e6  # the kernel counts pages in bunches


def test_peak_memory_is_unknown_elsewhere(monkeypatch):
    monkeypatch.setattr(machine, "_RESET", Path("/nowhere/at/all"))
    with measure_peak_memory(torch.device("cpu")) as peak:
        pass
    assert peak.bytes is None


def test_free_memory_is_what_the_system_tells_and_else_a_modest_guess(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemFree: 1 kB\nMemAvailable:    3 kB\n")
    monkeypatch.setattr(machine, "_SYSTEM", tmp_path / "meminfo")
    assert machine.free_memory(torch.device("cpu")) == 3 * 1024
    monkeypatch.setattr(machine, "_SYSTEM", tmp_path / "nothing, as on macOS and Windows")
    assert machine.free_memory(torch.device("cpu")) == 4 * 2**30


def test_the_machine_is_named():
    described = describe_machine(torch.device("cpu"))
    assert described["threads"] == torch.get_num_threads()
    assert described["device"].startswith("cpu (")
    json.dumps(described)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"num_models": 0}, ValueError, "at least 1 as num_models"),
        ({"num_models": 2.0}, TypeError, "whole number as num_models"),
        ({"epochs": 0}, ValueError, "at least 1 as epochs"),
        ({"warmup": -1}, ValueError, "at least 0 as warmup"),
        ({"max_steps": 2}, ValueError, "more than 2 steps"),
        ({"batch_size": 500, "epochs": 9}, ValueError, "a full batch of 500"),
        ({"learning_rates": [0.1]}, ValueError, r"4 learning rates \(one per model\), got 1"),
        ({"learning_rates": [0.1, 0.1, 0.1, -1.0]}, ValueError, "-1"),
        ({"seeds": [1]}, ValueError, "4 seeds"),
        ({"hyperparameters": {"momentun": 0.9}}, (TypeError, ValueError), "momentun"),
    ],
)
def test_bad_input_is_refused(digits, changes, error, text):
    with pytest.raises(error, match=text):
        run(digits, **changes)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="Did you mean"):
        run_benchmark("digit")
