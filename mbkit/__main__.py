"""python -m mbkit: the story, the benchmark and the lessons from a terminal."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .benchmark.lenet import run_benchmark
from .benchmark.suite import run_suite
from .common.tables import text_table
from .data.load import load_images
from .lessons.consistency import PRESETS, PUBLISHED, dissect, preset, run, switches
from .lessons.demo_result import DEMO_FAULTS

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PICTURES = (".png", ".pdf", ".svg", ".jpg")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 2 for a wrong argument, 130 after Ctrl-C."""
    options = _build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, TypeError, OSError) as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m mbkit",
        description="Train many models at once, each exactly as if it were trained alone. Without a command: the story "
        "of the published table that nobody could explain, then a benchmark.",
    )
    parser.add_argument("--figure", type=_picture, default="mbkit.png", help="where the picture goes (%(default)s)")
    parser.set_defaults(run=_story, prog=parser.prog)
    commands = parser.add_subparsers(title="commands", metavar="command")
    for name, (help_, add_options, run_) in COMMANDS.items():
        command = commands.add_parser(name, help=help_)
        add_options(command)
        command.set_defaults(run=run_, prog=command.prog)
    return parser


# What options take, checked before anything else happens.


def _whole(most: int | None = None) -> Callable[[str], int]:
    def whole(text: str) -> int:
        number = int(text)
        if number < 1 or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"expected {f'1 to {most}' if most else '1 or more'}, got {text}")
        return number

    return whole


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(PICTURES)}, got {text}")
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that can be written to, got {text}")
    return path


# The story, where no command is given.


def _story(options: argparse.Namespace) -> None:
    from .figures import plots

    _title("1. A published table that nobody could explain")
    print("A library trained three models in one batch, and they ended elsewhere than the\nsame three trained alone.")
    published = run("published")
    rows = [["", "Model 0", "Model 1", "Model 2"]]
    for name, row in published.table().items():
        rows += [[f"{name}, published", *PUBLISHED[name]], [f"{name}, here", *row]]
    print(f"\n{text_table(rows)}\n\nMax difference: {published.max_difference:.1%}, {published.verdict}")
    print("reproduced to the decimal" if published.table() == PUBLISHED else "NOT reproduced on this machine")

    _title("2. The fix: zero_grad() clears the stacked gradients; same weights, same batches")
    print(run("published", gradients="cleared", weights="same", order="same"))

    _title("3. Three causes in one table: all eight combinations")
    eight = dissect("published")
    print(eight)

    _title("4. Sixteen LeNets, alone and in one batch")
    data = load_images("auto", download=False)
    if len(data.images) > 8000:
        data = data.subset(8000, 2000)
    measured = run_benchmark(data, 16, epochs=4, max_steps=60)
    print(measured)
    _save(plots.combinations(eight), options.figure)
    print("\nThe lessons: python -m mbkit lab      (after: pip install -e '.[lab]')")


def _title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    print(f"\nPicture: {path}")


# consistency


def _consistency_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", default="published", help=f"one of {', '.join(PRESETS)} (%(default)s)")
    command.add_argument("--lrs", type=float, nargs="+", metavar="LR", help="learning rates, one per model")
    command.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="one run for each seed")
    command.add_argument("--epochs", type=int, help="how often each point is seen")
    command.add_argument("--samples", type=int, help="number of points")
    command.add_argument("--optimizer", help="a class of torch.optim")
    faults = f"what to plant: none, or any of {', '.join(DEMO_FAULTS)} (all of them, as published)"
    command.add_argument("--fault", nargs="+", metavar="FAULT", default=list(DEMO_FAULTS), help=faults)
    command.add_argument("--dissect", action="store_true", help="run all combinations of the faults instead")


def _consistency(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("epochs", "samples", "optimizer")}
    changes = {name: value for name, value in {**given, "learning_rates": options.lrs}.items() if value is not None}
    demo = preset(options.preset, **changes)
    chosen = switches([] if options.fault == ["none"] else options.fault)
    for seed in options.seeds or [demo.seed]:
        seeded = preset(options.preset, **changes, seed=seed)
        print(dissect(seeded) if options.dissect else run(seeded, **chosen), end="\n\n")


# benchmark


def _benchmark_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--models", type=_whole(), default=16, help="how many (%(default)s)")
    command.add_argument("--epochs", type=_whole(), default=1, help="walks through the training images (%(default)s)")
    command.add_argument("--dataset", default="auto", choices=["auto", "cifar10", "digits"], help="(%(default)s)")
    command.add_argument("--images", type=_whole(), help="train on that many of them only")
    command.add_argument("--batch-size", type=_whole(), default=128, help="images in a batch (%(default)s)")
    command.add_argument("--lrs", type=float, nargs="+", metavar="LR", help="learning rates, one per model")
    # What torch cannot start would end the process.
    command.add_argument("--threads", type=_whole(1024), default=torch.get_num_threads(), help="of torch (%(default)s)")
    command.add_argument("--figure", type=_picture, metavar="FILE", help="save a picture")
    suite = "measure every way to train, case by case, instead; keep the raw times in this file (%(const)s)"
    command.add_argument("--suite", type=Path, nargs="?", const="suite.json", metavar="FILE", help=suite)


def _benchmark(options: argparse.Namespace) -> None:
    from .figures import plots, speed

    torch.set_num_threads(options.threads)
    if options.suite:
        result, draw = run_suite(save=options.suite), speed.speedups
    else:
        data = load_images(options.dataset)
        data = data if options.images is None else data.subset(options.images)
        settings = {"epochs": options.epochs, "batch_size": options.batch_size, "learning_rates": options.lrs}
        result, draw = run_benchmark(data, options.models, **settings), plots.benchmark
    print(result)
    if options.figure:
        _save(draw(result), options.figure)


# sweep


def _sweep_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="mlp", choices=["mlp", "lenet"], help="(%(default)s)")
    command.add_argument("--trials", type=_whole(), default=1000, help="how many configurations (%(default)s)")
    command.add_argument("--rungs", type=_whole(), nargs="+", default=[1, 3, 9], metavar="EPOCHS", help="(1 3 9)")
    command.add_argument("--seed", type=int, default=0, help="of the configurations (%(default)s)")
    command.add_argument("--folder", type=Path, default=Path("runs/digits"), help="where it is kept (%(default)s)")
    command.add_argument("--figure", type=_picture, metavar="FILE", help="save a picture")


def _sweep(options: argparse.Namespace) -> None:
    from .sweep.digits import sweep_digits

    result = sweep_digits(options.model, options.trials, options.folder, options.rungs, options.seed)
    best = result.best
    print(f"{result}\n\nBest: trial {best.number}, {best.score:.1%} of the test digits right, {best.config}")
    print(f"The models are in {result.folder}; the same command again finds them there.")
    if options.figure:
        _save(result.plot(), options.figure)


# lab


def _lab_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-browser", action="store_true", help="only print the address")


def _lab(options: argparse.Namespace) -> int:
    first = next((path for name in ("index*", "0*") for path in sorted(NOTEBOOKS.glob(f"{name}.ipynb"))), None)
    if first is None:
        raise FileNotFoundError("The notebooks come with a checkout of mbkit, not with a wheel: clone it first.")
    if importlib.util.find_spec("jupyterlab") is None:
        raise FileNotFoundError("JupyterLab is not installed: pip install -e '.[lab]'")
    place = [f"--ServerApp.root_dir={NOTEBOOKS}", f"--LabApp.default_url=/lab/tree/{first.name}"]
    command = [sys.executable, "-m", "jupyterlab", *place, *["--no-browser"] * options.no_browser]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # or JupyterLab refuses to start
    return subprocess.run(command, check=False).returncode


# A command: what --help says of it, a function that adds its options, and one that runs it.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Any]]] = {
    "consistency": (
        "train the demo's models alone and in a batch, and compare",
        _consistency_options,
        _consistency,
    ),
    "benchmark": ("train LeNets alone and in a batch, and time both", _benchmark_options, _benchmark),
    "sweep": ("search a thousand configurations on the digits; go on where it ended", _sweep_options, _sweep),
    "lab": ("open the lessons in JupyterLab", _lab_options, _lab),
}

if __name__ == "__main__":
    sys.exit(main())
