"""A closed explorer is gone, and what no explorer could show is refused before anything is allocated."""

import gc
import threading
import weakref

import pytest
import torch
from ipywidgets.widgets.widget import _instances as OPEN
from torch import nn

from mbkit import widgets
from mbkit.widgets.grid import MOST_LOSSES

SMALL = {
    "explore_consistency": {"epochs": 1},
    "explore_faults": {"fault": "mean-loss"},
    "explore_learning_rates": {"num_rates": 2, "num_seeds": 2, "steps": 3},
    "explore_trainability": {"size": 4, "steps": 3},
}


@pytest.mark.parametrize("name", [name for name in widgets.__all__ if name.startswith("explore_")])
def test_a_closed_explorer_leaves_no_thread_no_widget_and_no_memory(name):
    gc.collect()
    threads, open_widgets = threading.active_count(), len(OPEN)
    explorer = getattr(widgets, name)(**SMALL[name]).wait()
    assert len(OPEN) > open_widgets
    kept = [weakref.ref(thing) for thing in (explorer, explorer.worker, explorer.image, explorer.status)]
    explorer.close()
    explorer.close()  # twice is harmless
    assert threading.active_count() == threads
    assert len(OPEN) == open_widgets
    del explorer
    gc.collect()
    assert [each() for each in kept] == [None] * len(kept)


def test_what_was_trained_can_be_read_after_closing(show):
    explorer = show(widgets.explore_learning_rates, **SMALL["explore_learning_rates"]).wait()
    explorer.close()
    assert explorer.loss.shape == (3, 4)
    assert explorer.png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("explore", "settings", "message"),
    [
        (widgets.explore_trainability, {"size": 10**5}, "at most 65,536 networks, got 10,000,000,000"),
        (widgets.explore_trainability, {"size": 0}, "at least 1 as size, got 0"),
        (widgets.explore_trainability, {"size": 128, "steps": 10**6}, "at most 16,384 steps for 16,384 networks"),
        (widgets.explore_trainability, {"steps": 0}, "at least 1 as steps"),
        (widgets.explore_trainability, {"seed": 101}, "seed from 0 to 100, got 101"),
        (widgets.explore_trainability, {"first_rates": (0, 1)}, "first_rates as the lowest and the highest rate.*0, 1"),
        (widgets.explore_trainability, {"second_rates": (1.0, 0.1)}, "second_rates as the lowest and the highest rate"),
        (widgets.explore_learning_rates, {"num_rates": 33}, "num_rates from 1 to 32, got 33"),
        (widgets.explore_learning_rates, {"num_seeds": 99}, "num_seeds from 1 to 16, got 99"),
        (widgets.explore_learning_rates, {"num_seeds": 0}, "at least 1 as num_seeds, got 0"),
        (widgets.explore_learning_rates, {"steps": MOST_LOSSES}, "steps for 36 networks"),
        (widgets.explore_learning_rates, {"rates": (0, 1)}, "rates as the lowest and the highest rate, both above 0"),
        (widgets.explore_learning_rates, {"rates": (0.1, float("nan"))}, "rates as the lowest and the highest rate"),
        (widgets.explore_consistency, {"learning_rates": [0.1] * 7}, "models M from 1 to 6, got 7"),
        (widgets.explore_consistency, {"learning_rates": [0.0, 0.1]}, "lowest and the highest rate, both above 0"),
        (widgets.explore_consistency, {"seed": 101}, "seed from 0 to 100, got 101"),
        (widgets.explore_faults, {"rates": (0, 1)}, "lowest and the highest rate, both above 0, got 0, 1"),
        (widgets.explore_faults, {"seed": -1}, "at least 0 as seed, got -1"),
    ],
)
def test_what_cannot_be_shown_is_refused_at_once(explore, settings, message):
    threads = threading.active_count()
    with pytest.raises(ValueError, match=message):
        explore(**settings)
    assert threading.active_count() == threads


def test_a_size_that_the_slider_reaches_later_is_refused_too(show):
    explorer = show(widgets.explore_trainability, size=16, steps=2).wait()
    explorer.steps = MOST_LOSSES // 32**2 + 1
    explorer.size.value = 32
    with pytest.raises(ValueError, match="steps for 1,024 networks"):
        explorer.wait()


def test_models_that_do_not_fit_into_memory_are_refused_before_they_are_built(show, monkeypatch):
    built = []

    def build():
        built.append(nn.Linear(100, 100))
        return built[-1]

    monkeypatch.setattr("mbkit.models.free_memory", lambda device: 1_000_000)
    batches = [(torch.randn(4, 100), torch.arange(4))]
    explorer = show(widgets.explore_learning_rates, build, batches, num_rates=4, num_seeds=2, steps=2)
    with pytest.raises(ValueError, match=r"at most 6 models of 0\.0404 MB, as many as memory is for, got 8"):
        explorer.wait()
    assert len(built) == 1
