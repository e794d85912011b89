"""Every kind of layer with every habit of training, in a batch as alone."""

from __future__ import annotations

import pytest
from exactness_habits import CASES
from test_exactness import REFUSED
from training_habits import problem

# What a call keeps has no form in which one of the models could keep it unchanged: to freeze models is refused by name.
ONE_FOR_ALL = """buffer that grows (cat); plain tensor attribute, growing; list of tensors that grows; Python counter;
    Python state before a branch""".replace("\n    ", " ").split("; ")
KINDS = [name for name, case in CASES.items() if case.grad and name not in REFUSED]
CELLS = [(name, shared) for name in KINDS for shared in (True, False)]
NAMED = {"LSTM", "RNN(relu)", "GRUCell", "PReLU", "PReLU per channel", "parameter hook (doubles grad)"}


def is_fast(i: int, name: str, shared: bool) -> bool:
    return i % 34 in (0, 17) or (name in NAMED and shared)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        pytest.param(
            name,
            shared,
            id=f"{name} {'shared' if shared else 'own'}",
            marks=() if is_fast(i, name, shared) else pytest.mark.slow,
        )
        for i, (name, shared) in enumerate(CELLS)
    ],
)
def test_every_habit_as_alone(name, shared):
    if name.removesuffix(", below") in ONE_FOR_ALL:
        assert "one value for all models, so frozen ones cannot keep theirs" in problem(CASES[name], shared)
        assert problem(CASES[name], shared, without="frozen") == ""
    else:  # to trace a step takes longer than all other habits: it is done once for each kind
        assert problem(CASES[name], shared, without="" if shared else "compiled") == ""
