"""python -m mbkit: what it prints, and what it answers to a wrong argument."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from mbkit.__main__ import main
from mbkit.benchmark.cases import Case
from mbkit.benchmark.suite import SuiteResult, run_suite

SIDES = ["sequential, malloc set", "mbkit"]


def test_consistency_prints_the_published_table(capsys):
    assert main(["consistency"]) == 0
    printed = capsys.readouterr().out
    assert "ModelBatch       50.7%    76.7%    80.7%" in printed
    assert "DIVERGENT" in printed


def test_consistency_without_faults_is_consistent_for_each_seed(capsys):
    chosen = "--preset quick --lrs 0.003 0.03 --seeds 1 2 --fault none"
    assert main(["consistency", *chosen.split()]) == 0
    printed = capsys.readouterr().out
    assert printed.count("CONSISTENT") == 2
    assert "DIVERGENT" not in printed
    assert "seed: 1" in printed
    assert "seed: 2" in printed


def test_consistency_plants_only_the_faults_it_is_asked_for(capsys):
    assert main(["consistency", "--fault", "stale-gradients"]) == 0
    assert "Stale gradients, same initial weights, same order of batches" in capsys.readouterr().out


def test_dissect_shows_eight_rows(capsys):
    assert main(["consistency", "--dissect"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("DIVERGENT") == 7
    assert printed.count("CONSISTENT") == 1


def test_benchmark_measures_and_draws(capsys, tmp_path):
    files = ["--figure", str(tmp_path / "benchmark.png")]
    size = ["--dataset", "digits", "--models", "2", "--images", "300", "--batch-size", "32", "--threads", "1"]
    assert main(["benchmark", *size, *files]) == 0
    printed = capsys.readouterr().out
    assert "2 x LeNet5" in printed
    assert "speed-up" in printed
    assert "4 steps timed, after 5 for warm-up" in printed  # 9 full batches, and one of what is left
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["consistency", "--preset", "publisched"], "Did you mean 'published'?"),
        (["consistency", "--fault", "stale-gradient"], "Did you mean 'stale-gradients'?"),
        (["consistency", "--lrs", "-1"], "learning rates of 0 or more"),
        (["consistency", "--lrs", "fast"], "invalid float value: 'fast'"),
        (["consistency", "--optimizer", "Adamm"], "Did you mean 'Adam'?"),
        (["benchmark", "--models", "0"], "--models: expected 1 or more, got 0"),
        (["benchmark", "--figure", "no/such/folder.png"], "--figure: expected a file in a folder"),
        (["--figure", "story.txt"], "--figure: expected a name that ends in .png"),
        (["benchmark", "--dataset", "mnist"], "invalid choice: 'mnist'"),
        (["benchmark", "--threads", "0"], "--threads: expected 1 to 1024, got 0"),
        (["benchmark", "--threads", "100000000000"], "--threads: expected 1 to 1024"),
        (["benchmrk"], "argument command: invalid choice"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2_before_anything_is_loaded(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("mbkit.__main__.load_images", lambda *_, **__: pytest.fail("it loads images first"))
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err
    assert status == 2
    assert said.count("\n") == 1
    assert words in said


@pytest.mark.parametrize("command", [[], ["consistency"], ["benchmark"], ["lab"]])
def test_help_names_the_options(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: python -m mbkit" in capsys.readouterr().out


@pytest.mark.parametrize("root", [True, False])
def test_lab_opens_the_first_lesson_and_returns_what_jupyterlab_returns(root, monkeypatch):
    called = []
    monkeypatch.setattr("os.geteuid", lambda: 0 if root else 1000)
    monkeypatch.setattr("subprocess.run", lambda command, **_: called.append(command) or SimpleNamespace(returncode=3))
    assert main(["lab", "--no-browser"]) == 3
    assert main(["lab"]) == 3
    quiet, loud = called
    assert quiet[1:3] == ["-m", "jupyterlab"]
    assert any(argument.startswith("--LabApp.default_url=/lab/tree/") for argument in quiet)
    assert {*quiet} - {*loud} == {"--no-browser"}
    assert ("--allow-root" in quiet) == root


def test_import_is_light():
    """What only pictures, widgets, judges and compiled steps need is not imported before it is asked for."""
    later = "matplotlib PIL ipywidgets IPython tqdm torch._inductor mbkit.verify mbkit.figures mbkit.benchmark".split()
    code = "import sys, torch; before = {*sys.modules}; import mbkit; new = {*sys.modules} - before; "
    code += (
        f"print(sorted(new & {{*{later}}})); print(*sorted({{m.split('.')[0] for m in new}} - sys.stdlib_module_names))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, others = run.stdout.splitlines()
    assert found == "[]"
    foreign = {name for name in others.split() if "cython" not in name}
    assert foreign <= {"mbkit", "numpy", "safetensors"}  # and torch, which is there already


def test_benchmark_measures_the_suite_too(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("mbkit.__main__.run_suite", lambda save: run_suite([Case("MLP", 2, 4)], sides=SIDES, save=save))
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "--suite", "--threads", "1", "--figure", "bars.png"]) == 0
    assert "a loop, ms (quartiles)" in capsys.readouterr().out
    assert SuiteResult.load("suite.json").rows[0]["seconds"].keys() == set(SIDES)
    assert (tmp_path / "bars.png").exists()
