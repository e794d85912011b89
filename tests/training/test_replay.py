"""When a step is recorded and replayed, with a stand-in for the GPU; tests/test_cuda.py has the real one."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from mbkit.training.replay import Replay


class Device:
    """A graph records the tensors of a call, and makes it again on what stands in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, ...]] = []
        self.replays, self.refuses = 0, False
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.record)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    @contextmanager
    def record(self, graph, capture_error_mode):
        yield
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    def run(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        self.calls.append((weight, x))
        self.result = weight * x
        return [self.result]

    def replay(self) -> None:
        weight, x = self.calls[-1]
        self.result.copy_(weight * x)
        self.replays += 1


def test_a_step_runs_is_recorded_is_replayed_and_starts_again_where_a_tensor_has_moved(monkeypatch):
    device = Device(monkeypatch)
    step, weight, kept = Replay(device.run, 1), torch.tensor([2.0, 3.0]), []
    for n in range(4):  # each with another batch
        kept.append(step(weight, torch.full((2,), float(n)))[0])
    assert (len(device.calls), device.replays) == (2, 3)
    weight.add_(1)  # where it is
    kept.append(step(weight, torch.ones(2))[0])
    assert (len(device.calls), device.replays) == (2, 4)
    assert [result.tolist() for result in kept] == [[0, 0], [2, 3], [4, 6], [6, 9], [3, 4]]
    moved = weight + 1
    for n in range(3):
        assert step(moved, torch.full((2,), float(n)))[0].tolist() == [4 * n, 5 * n]
    assert (len(device.calls), device.replays) == (4, 6)


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch):
    device = Device(monkeypatch)
    device.refuses = True
    step, weight = Replay(device.run, 1), torch.tensor([2.0, 3.0])
    for n in range(4):
        assert step(weight, torch.full((2,), float(n)))[0].tolist() == [2 * n, 3 * n]
    assert device.replays == 0
