"""python -m mbkit: the story and the benchmark from a terminal."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .benchmark.lenet import BenchmarkResult, run_benchmark
from .benchmark.suite import run_suite
from .common.tables import text_table
from .data.load import load_images
from .lessons.consistency import PRESETS, PUBLISHED, dissect, preset, run, switches
from .lessons.demo_result import DEMO_FAULTS

MOST_THREADS = 1024  # what torch cannot start would end the process
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 2 for a wrong argument, 130 after Ctrl-C."""
    parser = _build_parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m mbkit",
        description="Train many models at once, each exactly as if it were trained alone. Without a command: the story "
        "of the published table that nobody could explain, then a benchmark that fits into a minute.",
    )
    parser.add_argument("--figure", type=Path, default=Path("mbkit.png"), help="where the picture goes (%(default)s)")
    parser.set_defaults(run=_story, prog=parser.prog)
    commands = parser.add_subparsers(title="commands", metavar="")

    check = commands.add_parser("consistency", help="train the demo's models alone and in a batch, and compare")
    check.add_argument("--preset", default="published", help=f"one of {', '.join(PRESETS)} (%(default)s)")
    check.add_argument("--lrs", type=float, nargs="+", metavar="LR", help="learning rates, one per model")
    check.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="one run for each seed")
    check.add_argument("--epochs", type=int, help="how often each point is seen")
    check.add_argument("--samples", type=int, help="number of points")
    check.add_argument("--optimizer", help="a class of torch.optim")
    faults = f"what to plant: none, or any of {', '.join(DEMO_FAULTS)} (all of them, as published)"
    check.add_argument("--fault", nargs="+", metavar="FAULT", default=list(DEMO_FAULTS), help=faults)
    check.add_argument("--dissect", action="store_true", help="run all combinations of the faults instead")
    check.set_defaults(run=_consistency, prog=check.prog)

    bench = commands.add_parser("benchmark", help="train LeNets alone and in a batch, and time both")
    bench.add_argument("--models", type=int, default=16, help="how many (%(default)s)")
    bench.add_argument("--epochs", type=int, default=1, help="walks through the training images (%(default)s)")
    bench.add_argument("--dataset", default="auto", choices=["auto", "cifar10", "digits"], help="(%(default)s)")
    bench.add_argument("--images", type=int, help="train on that many of them only")
    bench.add_argument("--batch-size", type=int, default=128, help="images in a batch (%(default)s)")
    bench.add_argument("--lrs", type=float, nargs="+", metavar="LR", help="learning rates, one per model")
    bench.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    bench.add_argument("--batch-only", action="store_true", help="leave out the models alone")
    bench.add_argument("--save", type=Path, metavar="FILE", help="write the raw runs as JSON")
    bench.add_argument("--figure", type=Path, help="save a picture")
    bench.add_argument("--suite", action="store_true", help="measure every way to train, case by case, instead")
    bench.set_defaults(run=_benchmark, prog=bench.prog)

    lab = commands.add_parser("lab", help="open the notebooks in JupyterLab")
    lab.set_defaults(run=_lab, prog=lab.prog)
    return parser


def _story(options: argparse.Namespace) -> None:
    _title("1. A published table that nobody could explain")
    print("A library trained three models in one batch, and they ended elsewhere than the same three trained alone.")
    published = run("published")
    rows = [["", "Model 0", "Model 1", "Model 2"]]
    for name, row in published.table().items():
        rows += [[f"{name}, published", *PUBLISHED[name]], [f"{name}, here", *row]]
    print(f"\n{text_table(rows)}\n\nMax difference: {published.max_difference:.1%}, {published.verdict}")
    print("reproduced to the decimal" if published.table() == PUBLISHED else "NOT reproduced on this machine")

    _title("2. The fix: zero_grad() clears the stacked gradients; and the same weights, the same batches")
    fixed = run("published", gradients="cleared", weights="same", order="same")
    print(fixed)

    _title("3. Three causes in one table: all eight combinations")
    eight = dissect("published")
    print(eight)

    _title("4. Sixteen LeNets, alone and in one batch")
    data = load_images("auto", download=False)
    if len(data.images) > 8000:
        data = data.subset(8000, 2000)
    measured = run_benchmark(data, 16, epochs=4, max_steps=60)
    print(measured)

    from .figures.plots import story_figure

    _save(story_figure(published, eight, measured), options.figure)
    print("\nThe lessons: python -m mbkit lab      (after: pip install -e '.[lab]')")


def _consistency(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("epochs", "samples", "optimizer")}
    changes = {name: value for name, value in {**given, "learning_rates": options.lrs}.items() if value is not None}
    demo = preset(options.preset, **changes)
    chosen = switches([] if options.fault == ["none"] else options.fault)
    for seed in options.seeds or [demo.seed]:
        seeded = preset(options.preset, **changes, seed=seed)
        print(dissect(seeded) if options.dissect else run(seeded, **chosen), end="\n\n")


def _benchmark(options: argparse.Namespace) -> None:
    if not 1 <= options.threads <= MOST_THREADS:
        raise ValueError(f"Expected 1 to {MOST_THREADS} threads, got {options.threads}.")
    torch.set_num_threads(options.threads)
    result = run_suite() if options.suite else _race(options)
    print(result)
    if options.save:
        result.save(options.save)
        print(f"\nRaw runs: {options.save}")
    if options.figure:
        from .figures import plots, speed

        _save((speed.speedups if options.suite else plots.benchmark)(result), options.figure)


def _race(options: argparse.Namespace) -> BenchmarkResult:
    data = load_images(options.dataset)
    if options.images is not None:
        data = data.subset(options.images)
    settings = {"epochs": options.epochs, "batch_size": options.batch_size, "learning_rates": options.lrs}
    return run_benchmark(data, options.models, alone=not options.batch_only, **settings)


def _lab(options: argparse.Namespace) -> None:
    if not NOTEBOOKS.is_dir():
        raise FileNotFoundError("The notebooks come with a checkout of mbkit, not with a wheel: clone it first.")
    if importlib.util.find_spec("jupyterlab") is None:
        raise FileNotFoundError("JupyterLab is not installed: pip install -e '.[lab]'")
    subprocess.run([sys.executable, "-m", "jupyterlab", str(NOTEBOOKS)], check=False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    print(f"\nPicture: {path}")


def _title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n")


if __name__ == "__main__":
    sys.exit(main())
