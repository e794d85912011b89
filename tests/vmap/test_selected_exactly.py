"""Models that are taken out of a batch and put together again train on as alone, whatever their layers keep."""

from __future__ import annotations

import warnings

import pytest
import torch
from exactness_check import SEEDS, STEPS, batch_inputs, build, loss_of, run_alone, unlike, update
from exactness_habits import CASES
from test_exactness import REFUSED
from torch import Tensor

from mbkit import ModelBatch

CELLS = [(name, i % 2 == 0) for i, name in enumerate(CASES) if name not in REFUSED]
ROWS = [2, 0, 1]


def step(batch: ModelBatch, name: str, shared: bool, number: int, rows: list[int]) -> None:
    case = CASES[name]
    x = batch_inputs(case, shared, number, torch.float64)
    if not shared:
        x = [t[rows] if isinstance(t, Tensor) else t for t in x]
    with torch.set_grad_enabled(case.grad):
        losses = batch.compute_loss(batch(*x), torch.zeros(()), loss_of, reduction="none")
    if losses.requires_grad:
        losses.sum().backward()
    update(batch.parameters())


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        pytest.param(*cell, id=f"{cell[0]} {'shared' if cell[1] else 'own'}", marks=[pytest.mark.slow] * bool(i % 30))
        for i, cell in enumerate(CELLS)
    ],
)
def test_selected_and_merged_as_alone(name: str, shared: bool) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what runs model by model, and torch's own
            traces = run_alone(CASES[name], shared)
            wide = ModelBatch(build(CASES[name]), shared_input=shared, seeds=SEEDS)
            for number in range(2):
                step(wide, name, shared, number, [0, 1, 2])
            few, one = wide.select(ROWS[:2]), wide.select(ROWS[2])
            step(few, name, shared, 2, ROWS[:2])
            step(one, name, shared, 2, ROWS[2:])
            merged = ModelBatch.merge([few, one])
            for number in range(3, STEPS):
                step(merged, name, shared, number, ROWS)
    finally:
        torch.set_default_dtype(torch.float32)
    states = merged.get_model_states()
    for row, m in enumerate(ROWS):
        found = dict(traces[m])  # of each kind the last: the state after the last step, where the stream stands
        assert unlike(found["state"], states[row], 1e-10) is None
        if merged.streams.in_use:
            assert torch.equal(merged.streams.on("cpu")[row].get_state(), found["stream"])
