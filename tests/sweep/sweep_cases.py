"""Small sweeps for the tests of this folder: one standard sweep, plain PyTorch to judge it, and a digest of files."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from oracle import train_alone
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import mbkit
from mbkit.common.files import read_tree

RUNGS, FACTOR, PER_BATCH = (1, 2, 4), 2, 3
DOUBLE = {"dtype": torch.float64}


def data() -> list[tuple[Tensor, Tensor]]:
    """Return three batches, the last one smaller, made without the global generator."""
    own = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 4, generator=own, **DOUBLE), torch.randint(3, (20,), generator=own)
    return list(zip(x.split(8), y.split(8), strict=True))


def valid() -> list[tuple[Tensor, Tensor]]:
    own = torch.Generator().manual_seed(2)
    return [(torch.randn(64, 4, generator=own, **DOUBLE), torch.randint(3, (64,), generator=own))]


class Net(nn.Module):
    """Dropout, BatchNorm, a buffer that no state_dict has, and a list that grows: all of it belongs to one model."""

    def __init__(self, width: int, dropout: float = 0.3) -> None:
        super().__init__()
        first = nn.Linear(4, width, bias=False, **DOUBLE)  # a bias before BatchNorm has no gradient but rounding
        self.body = nn.Sequential(first, nn.BatchNorm1d(width, **DOUBLE), nn.Dropout(dropout))
        self.head = nn.Linear(width, 3, **DOUBLE)
        self.register_buffer("mean", torch.zeros(width, **DOUBLE), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.head(h + self.mean)


CONFIGS = [
    {"lr": lr, "betas": betas, "width": width, "dropout": dropout}
    for width in (5, 6)
    for lr, betas, dropout in [
        (0.1, (0.9, 0.99), 0.0), (0.03, (0.8, 0.9), 0.5), (0.01, (0.9, 0.999), 0.2), (0.3, (0.5, 0.9), 0.1),
        (0.02, (0.9, 0.99), 0.4),
    ]
]  # fmt: skip
SEEDS = [7, 2**40, 0, 3, 11, 5, 6, 1, 8, 9]


def standard(folder: Path | None, **changes: Any) -> mbkit.sweep.SweepResult:
    """Run the standard sweep: ten trials of two architectures in batches of three, halved twice."""
    settings: dict[str, Any] = {
        "valid": valid, "folder": folder, "rungs": RUNGS, "reduction_factor": FACTOR, "models_per_batch": PER_BATCH,
        "seeds": SEEDS, "save_every": 0.0, "score": "loss", "progress": False,
    }  # fmt: skip
    given = {"build": Net, "optimizer_cls": torch.optim.Adam, "configs": CONFIGS, "data": data}
    given |= {"loss_fn": nn.functional.cross_entropy, **settings, **changes}
    return mbkit.sweep(**given)


def alone(
    make: Callable[[], nn.Module],
    seed: int,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    epochs: int,
    *,
    batches: Any = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    schedule_of: Callable[[Any], Any] | None = None,
    max_norm: float | None = None,
) -> tuple[nn.Module, float]:
    """Train one trial by plain PyTorch; return the model, and the mean loss of its last epoch."""
    torch.manual_seed(seed)
    model = make()
    batches = data() if batches is None else batches
    pairs = [pair for _ in range(epochs) for pair in batches]
    how = {"optimizer_cls": lambda _: optimizer_of(model), "configs": {}, "seeds": [seed], "max_norm": max_norm}
    losses = train_alone([model], pairs, loss_fn=loss_fn, schedule=schedule_of, every=len(batches), **how)
    return model, losses[-len(batches) :].mean().item()


def valid_loss(model: nn.Module, loss_fn: Callable = nn.functional.cross_entropy) -> float:
    ((x, y),) = valid()
    model.eval()
    with torch.no_grad():
        return loss_fn(model(x), y).item()


def digest(folder: Path) -> str:
    """Return a checksum of all that a finished sweep holds: tensors, scores, who was in which batch."""
    whole = hashlib.sha256()
    for file in sorted(Path(folder).rglob("batch-*")):
        leaves, form = tree_flatten(read_tree(file, "batch of a sweep"))
        whole.update(f"{file.relative_to(folder)} {form}".encode())
        for leaf in leaves:
            whole.update(leaf.numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
    return whole.hexdigest()


def killed(run: Callable[[], Any], after: int, before: bool = True) -> tuple[int | None, int]:
    """Run something in a forked process that is killed -9 at its n-th event; an event is a step or a change of files.

    Returns:
        How it ended (None: it was killed), and how many events there were if it was not.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            signal.alarm(60)  # a test that hangs ends
            events = _count_events(after, before)
            run()
            os.write(write, str(len(events)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None, 0
    return os.WEXITSTATUS(status), int(said or 0)


def _count_events(after: int, before: bool) -> list[str]:
    events: list[str] = []

    def counted(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            if len(events) == after and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if len(events) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("replace", "unlink", "fsync"):
        setattr(os, name, counted(name, getattr(os, name)))
    from mbkit.optim.base import BatchOptimizer

    BatchOptimizer.zero_grad = counted("step", BatchOptimizer.zero_grad)
    return events


def schedule_of_kills(seed: int, kills: int, events: int) -> list[tuple[int, bool]]:
    """Return after how many events to kill, and whether before or after the last of them."""
    own = random.Random(seed)
    return [(own.randint(1, events), own.random() < 0.5) for _ in range(kills)]


def is_first(flag: str) -> bool:
    """Say whether nobody has asked before, and make the file by which that is known."""
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class DyingInSecondEpoch:
    """The data; the first process that comes to a second epoch is killed."""

    def __init__(self, flag: str) -> None:
        self.flag, self.walks = flag, 0

    def __iter__(self) -> Any:
        self.walks += 1
        if self.walks == 2 and is_first(self.flag):
            os.kill(os.getpid(), signal.SIGKILL)
        return iter(data())


def poisoned(fold: list[int]) -> Any:
    """Return the data of each model; whoever asks for that of fold 3 is killed."""
    if 3 in fold:
        os.kill(os.getpid(), signal.SIGKILL)
    return [(x.expand(len(fold), *x.shape), y.expand(len(fold), *y.shape)) for x, y in data()]


def whose_worker_dies_once(flag: str) -> Any:
    """Return the data, but kill the process that waits for this one if nobody has before: a worker of Dask."""
    if is_first(flag):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # until this one notices
    return data()


def slow_after(flag: str) -> Any:
    """Return the data, and let the first one who asks wait until it is killed."""
    if is_first(flag):
        time.sleep(60)
    return data()
