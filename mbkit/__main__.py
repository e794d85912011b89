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

    def command(name: str, run_: Callable[[argparse.Namespace], Any], help_: str) -> Callable[..., argparse.Action]:
        added = commands.add_parser(name, help=help_)
        added.set_defaults(run=run_, prog=added.prog)
        return added.add_argument

    option = command("consistency", _consistency, "train the demo's models alone and in a batch, and compare")
    option("--preset", default="published", help=f"one of {', '.join(PRESETS)} (%(default)s)")
    option("--lrs", type=float, nargs="+", metavar="LR", help="learning rates, one per model")
    option("--seeds", type=int, nargs="+", metavar="SEED", help="one run for each seed")
    option("--epochs", type=int, help="how often each point is seen")
    option("--samples", type=int, help="number of points")
    option("--optimizer", help="a class of torch.optim")
    faults = f"what to plant: none, or any of {', '.join(DEMO_FAULTS)} (all of them, as published)"
    option("--fault", nargs="+", metavar="FAULT", default=list(DEMO_FAULTS), help=faults)
    option("--dissect", action="store_true", help="run all combinations of the faults instead")

    option = command("benchmark", _benchmark, "train LeNets alone and in a batch, and time both")
    option("--models", type=_whole(), default=16, help="how many (%(default)s)")
    option("--epochs", type=_whole(), default=1, help="walks through the training images (%(default)s)")
    option("--dataset", default="auto", choices=["auto", "cifar10", "digits"], help="(%(default)s)")
    option("--images", type=_whole(), help="train on that many of them only")
    option("--batch-size", type=_whole(), default=128, help="images in a batch (%(default)s)")
    option("--lrs", type=float, nargs="+", metavar="LR", help="learning rates, one per model")
    # What torch cannot start would end the process.
    option("--threads", type=_whole(1024), default=torch.get_num_threads(), help="of torch (%(default)s)")
    option("--figure", type=_picture, metavar="FILE", help="save a picture")
    suite = "measure every way to train, case by case, instead; keep the raw times in this file (%(const)s)"
    option("--suite", type=Path, nargs="?", const="suite.json", metavar="FILE", help=suite)

    option = command("sweep", _sweep, "search a thousand configurations on the digits; go on where it ended")
    option("--model", default="mlp", choices=["mlp", "lenet"], help="(%(default)s)")
    option("--trials", type=_whole(), default=1000, help="how many configurations (%(default)s)")
    option("--rungs", type=_whole(), nargs="+", default=[1, 3, 9], metavar="EPOCHS", help="(1 3 9)")
    option("--seed", type=int, default=0, help="of the configurations (%(default)s)")
    option("--folder", type=Path, default=Path("runs/digits"), help="where it is kept (%(default)s)")
    option("--figure", type=_picture, metavar="FILE", help="save a picture")

    option = command("lab", _lab, "open the lessons in JupyterLab")
    option("--no-browser", action="store_true", help="only print the address")
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


def _consistency(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("epochs", "samples", "optimizer")}
    changes = {name: value for name, value in {**given, "learning_rates": options.lrs}.items() if value is not None}
    demo = preset(options.preset, **changes)
    chosen = switches([] if options.fault == ["none"] else options.fault)
    for seed in options.seeds or [demo.seed]:
        seeded = preset(options.preset, **changes, seed=seed)
        print(dissect(seeded) if options.dissect else run(seeded, **chosen), end="\n\n")


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


def _sweep(options: argparse.Namespace) -> None:
    from .sweep.digits import sweep_digits

    result = sweep_digits(options.model, options.trials, options.folder, options.rungs, options.seed)
    best = result.best
    print(f"{result}\n\nBest: trial {best.number}, {best.score:.1%} of the test digits right, {best.config}")
    print(f"The models are in {result.folder}; the same command again finds them there.")
    if options.figure:
        _save(result.plot(), options.figure)


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


if __name__ == "__main__":
    sys.exit(main())
