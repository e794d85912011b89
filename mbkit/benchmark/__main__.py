"""python -m mbkit.benchmark: the suite, with a choice of cases and sides, and what it has recorded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .baselines import BASELINES, LOOP
from .cases import CASES, NETWORKS, cases_of
from .suite import SuiteResult, run_suite

# From one model to as many as memory holds, for a table and a picture of what building, a step and memory cost.
SCALE = {"networks": ["MLP"], "models": [4**n for n in range(8)], "sides": [LOOP, "mbkit"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or load, print, and draw."""
    parser = argparse.ArgumentParser(prog="python -m mbkit.benchmark", description="Time every way to train models.")
    parser.add_argument("what", choices=["suite", "scale", "show"], help="measure all ways to train; measure how "
                        "costs grow from 1 to 16,384 small models; or print what a file has recorded")  # fmt: skip
    parser.add_argument("file", type=Path, help="JSON, written after each case, or shown")
    parser.add_argument("--figure", type=Path, help="save a picture of the speed-ups, as bars")
    parser.add_argument("--curves", type=Path, help="save a picture of the costs of a model as M grows")
    parser.add_argument("--models", type=int, nargs="+", metavar="M", help="a case for each number of models")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="for --models (all)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", default=[], help="for --models")
    parser.add_argument("--sides", nargs="+", choices=BASELINES, metavar="SIDE", help="; ".join(BASELINES))
    parser.add_argument("--device", default="cpu", help="of torch (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no case after so many")
    parser.add_argument("--patience", type=float, default=180, help="seconds until a side is ready (%(default)s)")
    options = parser.parse_args(arguments)
    if options.what == "show":
        result = SuiteResult.load(options.file)
    else:
        for name, value in SCALE.items() if options.what == "scale" else ():
            setattr(options, name, getattr(options, name) or value)
        cases = cases_of(options.networks or NETWORKS, options.models or [], options.batch_sizes, options.device)
        limits = {"minutes": options.minutes, "patience": options.patience}
        torch.set_num_threads(options.threads)
        result = run_suite(cases or CASES, sides=options.sides, save=options.file, **limits)
    print(result)
    if options.figure or options.curves:
        from ..figures import speed

        for file, draw in ((options.figure, speed.speedups), (options.curves, speed.growth)):
            if file:
                draw(result).savefig(file)


if __name__ == "__main__":
    main()
