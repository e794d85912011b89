"""An honest benchmark: M image classifiers trained alone and in a batch, on the same batches, timed in turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import check_seeds, per_model, whole_number
from ..common.machine import describe_machine, measure_peak_memory
from ..common.progress import Progress
from ..data.load import ImageData, load_images
from ..models import LeNet5, build_models
from ..optim import create_lr_sweep_configs
from ..training.evaluation import evaluate
from ..training.loop import walk
from .baselines import BASELINES, Side
from .result import BenchmarkResult

# Adam's useful range for a LeNet on CIFAR-10 in batches of 128: about 0.003 is best, both ends train, and worse.
MIN_LR, MAX_LR = 3e-4, 1e-2
BLOCK = 10  # steps that each model, or the batch, makes in one turn
_Block = list[tuple[Tensor, Tensor]]
SIDES = ("sequential", "mbkit")
_TIMING = f"batches are fetched outside the clock, which waits for the device; the sides take turns every {BLOCK} steps"


def learning_rate_grid(num_models: int, min_lr: float = MIN_LR, max_lr: float = MAX_LR) -> tuple[list, list]:
    """Return M learning rates on a logarithmic grid, and M seeds: two models per rate, or one where M is odd or 2.

    Example:
        >>> learning_rate_grid(4, 0.001, 0.1)
        ([0.001, 0.001, 0.1, 0.1], [0, 1, 0, 1])
    """
    seeds = 2 if num_models % 2 == 0 and num_models > 2 else 1
    rates = [config["lr"] for config in create_lr_sweep_configs(min_lr, max_lr, num_models // seeds)]
    return [rate for rate in rates for _ in range(seeds)], [*range(seeds)] * len(rates)


def run_benchmark(
    data: ImageData | str = "auto",
    num_models: int = 8,
    *,
    learning_rates: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    model: Callable[[int], nn.Module] = LeNet5,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.Adam,
    hyperparameters: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    epochs: int = 1,
    max_steps: int | None = None,
    warmup: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> BenchmarkResult:
    """Train M models alone and in a batch on the same batches, and measure both.

    The data lies on the device as uint8 and is fetched once a step, outside the clock, for both sides. The sides take
    turns in this one process, every 10 steps and each first every other time, so that whatever else the machine does
    hits both; the clock covers forward, backward and update and waits for the device. Left out on purpose: torch's
    thread count is what the caller has set, and is reported.

    Args:
        data: images, or a name for `load_images`.
        num_models: M.
        learning_rates: M numbers; `learning_rate_grid(M)` when absent.
        seeds: M whole numbers, from which model m is initialized and draws; of the grid when absent.
        model: makes one from the number of classes K.
        optimizer_cls: a class of torch.optim.
        hyperparameters: further arguments for it, each one value for all models or a list of M.
        batch_size: B.
        epochs: walks through the training set.
        max_steps: an end before that, for a quick run.
        warmup: steps at the start, trained but not timed; memory is measured in them.
        device: where both sides and the data are.
        dtype: float32, or float64 to see both sides agree.
        progress: show a bar on a terminal or in a notebook.

    Returns:
        A BenchmarkResult, which prints itself.

    Raises:
        TypeError, ValueError: numbers that are no positive whole numbers, more warm-up than steps, no full batch to
            time, or what ModelBatch, OptimizerFactory and load_images refuse.

    Example:
        >>> result = run_benchmark("digits", num_models=2, max_steps=8, warmup=2)
        >>> result.alone_seconds.shape, bool(result.parameter_difference.max() < 1e-3)
        (torch.Size([6, 2]), True)
    """
    for name, value in {"num_models": num_models, "batch_size": batch_size, "epochs": epochs}.items():
        whole_number(value, name)
    whole_number(warmup, "warmup", least=0)
    device = torch.device(device)
    data = (load_images(data) if isinstance(data, str) else data).to(device)
    batches = data.batches(batch_size, dtype=dtype)
    steps = epochs * len(batches)
    if max_steps is not None:
        steps = min(steps, whole_number(max_steps, "max_steps"))
    if steps <= warmup or len(data.images) < batch_size:
        told = f"Expected more than {warmup} steps (that many are for warm-up) and a full batch of {batch_size}"
        raise ValueError(f"{told}, got {steps} and {len(data.images):,} images: use more of them, or smaller batches.")
    grid_rates, grid_seeds = learning_rate_grid(num_models)
    rates = grid_rates if learning_rates is None else per_model(list(learning_rates), num_models, "learning rates")
    seeds = check_seeds(grid_seeds if seeds is None else seeds, num_models)
    settings = {name: per_model(v, num_models, name) for name, v in {**(hyperparameters or {}), "lr": rates}.items()}
    configs = [{name: values[m] for name, values in settings.items()} for m in range(num_models)]
    built = build_models(lambda: model(len(data.classes)), seeds)
    given = [each.to(device, dtype) for each in built], optimizer_cls, configs, seeds
    first = next(iter(_blocks(batches, 1, 1, 1, given[0][0])))
    for name in SIDES:  # what is loaded once in a process does not count as memory of either side
        BASELINES[name](given[0][:1], optimizer_cls, configs[:1], seeds[:1]).run(first)
    sides: dict[str, Side] = {}
    memory, sizes = {}, []
    with Progress(len(SIDES) * steps, "benchmark", progress) as bar:
        for turn, block in enumerate(_blocks(batches, epochs, steps, warmup, given[0][0])):
            sizes += [len(y) for _, y in block]
            for name in SIDES if turn % 2 == 0 else reversed(SIDES):
                if turn == 0:  # built here, so that its state counts as memory
                    with measure_peak_memory(device) as peak:
                        sides[name] = BASELINES[name](*given)
                        sides[name].run(block)
                    memory[name] = peak.bytes
                else:
                    sides[name].run(block)
                bar.advance(steps=len(block))

    timed = torch.tensor([i >= warmup and size == batch_size for i, size in enumerate(sizes)])
    tests = data.test_batches(dtype=dtype)
    alone, batched = (sides[name] for name in SIDES)
    names = [name for name, _ in alone.trained[0].named_parameters()]
    gaps = [[(alone.read(m, n) - batched.read(m, n)).abs().max() for n in names] for m in range(num_models)]
    return BenchmarkResult(
        learning_rates=rates,
        seeds=seeds,
        batched_seconds=batched.seconds()[timed, 0],
        alone_seconds=alone.seconds()[timed],
        batched_accuracy=evaluate(batched.trained, tests),
        alone_accuracy=evaluate(alone.trained, tests),
        parameter_difference=torch.tensor(gaps).amax(1),
        batched_memory=memory["mbkit"],
        alone_memory=memory["sequential"],
        setup={
            "model": type(built[0]).__name__,
            "parameters": sum(p.numel() for p in built[0].parameters()),
            "optimizer": optimizer_cls.__name__,
            "hyperparameters": {name: values for name, values in settings.items() if name != "lr"},
            "batch_size": batch_size,
            "steps": steps,
            "warmup": warmup,
            "dtype": str(dtype).removeprefix("torch."),
            "dataset": data.name,
            "dataset_note": data.note,
            "timing": _TIMING,
        },
        machine=describe_machine(device),
    )


def _blocks(batches: Any, epochs: int, steps: int, warmup: int, model: nn.Module) -> Iterator[_Block]:
    """Cut the walk into the warm-up and then blocks of equal size."""
    pairs = itertools.chain.from_iterable(walk(batches, epoch, model) for epoch in range(epochs))
    pairs = itertools.islice(pairs, steps)
    block = list(itertools.islice(pairs, warmup or BLOCK))
    while block:
        yield block
        block = list(itertools.islice(pairs, BLOCK))
