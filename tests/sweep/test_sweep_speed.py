"""What a sweep costs beside `fit` on the same batches, and beside a process per trial; it prints, and asserts no time.

python -m pytest -m slow -s tests/sweep/test_sweep_speed.py        (SWEEP_TRIALS=2048 for the published size)
"""

from __future__ import annotations

import functools
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import close
from torch import nn

import mbkit
from mbkit.sweep.digits import digits_batches, mlp

TRIALS = int(os.environ.get("SWEEP_TRIALS", "128"))
CONFIGS = mbkit.sample(lr=(1e-4, 1e-1, "log"), weight_decay=(1e-6, 1e-1, "log"), dropout=(0.0, 0.6), n=TRIALS)
EPOCHS = 9


def sweep(rungs: tuple[int, ...]) -> Any:
    settings = {"rungs": rungs, "progress": False, "valid": functools.partial(digits_batches, "mlp", True)}
    data, loss_fn = functools.partial(digits_batches, "mlp"), nn.functional.cross_entropy
    return mbkit.sweep(functools.partial(mlp, 32), torch.optim.AdamW, CONFIGS, data, loss_fn, **settings)


def fit() -> list[torch.Tensor]:
    scores = []
    for start in range(0, TRIALS, 64):
        configs, models = CONFIGS[start : start + 64], []
        for seed, config in enumerate(configs, start):
            torch.manual_seed(seed)
            models.append(mlp(32, config["dropout"]))
        batch = mbkit.ModelBatch(models, seeds=range(start, start + len(models)))
        own = [{name: config[name] for name in ("lr", "weight_decay")} for config in configs]
        optimizer = mbkit.OptimizerFactory(torch.optim.AdamW).create_optimizer(batch, own)
        data = digits_batches("mlp")
        mbkit.fit(batch, optimizer, data, nn.functional.cross_entropy, EPOCHS, progress=False)
        scores.append(mbkit.evaluate(batch, digits_batches("mlp", True)))
    return scores


def alone(trial: int) -> float:
    torch.set_num_threads(1)
    config = CONFIGS[trial]
    torch.manual_seed(trial)
    model = mlp(32, config["dropout"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    torch.manual_seed(trial)
    batches = digits_batches("mlp")
    for _ in range(EPOCHS):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return mbkit.evaluate(model.eval(), digits_batches("mlp", True)).item()


def measured(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what was made, and the seconds of the clock and of all processors that it took."""

    def cpu() -> float:
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(use.ru_utime + use.ru_stime for use in uses)

    wall, busy = time.perf_counter(), cpu()
    made = run()
    return made, time.perf_counter() - wall, cpu() - busy


@pytest.mark.slow
def test_a_sweep_beside_fit_and_beside_a_process_per_trial(capsys: pytest.CaptureFixture) -> None:
    sweep((1,))  # imports
    scores, *by_fit = measured(fit)
    whole, *by_sweep = measured(lambda: sweep((EPOCHS,)))
    halved, *by_halving = measured(lambda: sweep((1, 3, EPOCHS)))
    rows = [["way", "trials", "seconds", "of processors", "of fit's"]]
    for name, count, (wall, busy) in [
        ("fit, batch by batch", TRIALS, by_fit),
        ("sweep, all to the end", TRIALS, by_sweep),
        ("sweep, halved (1, 3, 9)", TRIALS, by_halving),
    ]:
        rows.append([name, str(count), f"{wall:.1f}", f"{busy:.1f}", f"{busy / by_fit[1]:.2f}"])
    loky = pytest.importorskip("joblib.externals.loky")
    some = min(TRIALS, 128)
    with loky.ProcessPoolExecutor(2) as pool:
        list(pool.map(alone, range(2)))  # imports
        lone, wall, _ = measured(lambda: list(pool.map(alone, range(some))))
    rows.append(["a process per trial (loky, 2 workers)", str(some), f"{wall:.1f}", "", ""])
    with capsys.disabled():
        print("\n" + mbkit.common.tables.text_table(rows))
    got = torch.tensor([trial.score for trial in whole.trials], dtype=torch.float64)
    close(got, torch.cat(scores), 0.02)  # float32: a digit or two of the test set
    close(got[:some], torch.tensor(lone, dtype=torch.float64), 0.02)
    assert halved.best.score > got.max() - 0.05
