"""What a History says about numbers that are written down here."""

import json
import math

import pytest
import torch

from mbkit.training.history import History, Step
from mbkit.training.recorder import Recording

NAN = math.nan


@pytest.fixture
def history():
    """Two models, three steps in two epochs; model 1 stopped after two."""
    return History(
        loss=torch.tensor([[4.0, 3.0], [2.0, 1.0], [1.0, NAN]]),
        accuracy=torch.tensor([[0.0, 0.5], [0.5, 1.0], [0.75, NAN]]),
        seconds=0.25,
        step_seconds=torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.1, NAN]]),
        epoch=torch.tensor([0, 0, 1]),
        steps_done=[3, 2],
    )


def test_counts_last_steps_and_means(history):
    assert (history.num_models, history.steps, history.epochs, len(history)) == (2, 3, 2, 3)
    assert history.final()["loss"].tolist() == [1.0, 1.0]  # each model's own last step
    assert history.final()["accuracy"].tolist() == [0.75, 1.0]
    means = history.by_epoch()
    torch.testing.assert_close(means["loss"], torch.tensor([[3.0, 2.0], [1.0, NAN]]), equal_nan=True)
    torch.testing.assert_close(means["accuracy"], torch.tensor([[0.25, 0.75], [0.75, NAN]]), equal_nan=True)
    history.epoch = torch.tensor([5, 5, 6])  # a run that starts at a later epoch
    assert (history.epochs, history.by_epoch()["loss"].shape) == (2, (2, 2))


def test_to_dict_is_strict_json(history):
    history.loss[0, 0] = math.inf
    text = json.dumps(history.to_dict(), allow_nan=False)
    assert json.loads(text) == {
        "loss": [[None, 3.0], [2.0, 1.0], [1.0, None]],
        "accuracy": [[0.0, 0.5], [0.5, 1.0], [0.75, None]],
        "seconds": 0.25,
        "step_seconds": [[pytest.approx(0.1)] * 2, [pytest.approx(0.1)] * 2, [pytest.approx(0.1), None]],
        "epoch": [0, 0, 1],
        "steps_done": [3, 2],
        "interrupted": False,
        "frozen": [],
        "how": "",
    }


def test_it_prints_as_a_table(history):
    lines = repr(history).splitlines()
    assert lines[0] == "History: 2 models, 3 steps in 2 epochs, 0.25 s"
    assert lines[1].split() == "model steps first loss last loss accuracy in the last epoch".split()
    assert lines[2].split() == ["0", "3", "4", "1", "75.0", "%"]
    assert lines[3].split()[:4] == ["1", "2", "3", "1"]
    assert "<td>75.0 %</td>" in history._repr_html_()
    history.interrupted, history.accuracy = True, None
    assert repr(history).splitlines()[0].endswith("interrupted")
    assert "accuracy" not in repr(history)
    many = History(torch.ones(2, 500), None, 1.0, torch.ones(2), torch.zeros(2, dtype=torch.int64), [2] * 500)
    assert len(repr(many).splitlines()) < 30
    assert "..." in repr(many)


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_without_a_step(alone):
    with Recording(3, None, alone=alone) as run:
        pass
    history = run.history
    assert (history.loss.shape, history.accuracy, history.steps_done) == ((0, 3), None, [0, 0, 0])
    assert history.step_seconds.shape == ((0, 3) if alone else (0,))
    assert history.final()["loss"].isnan().all()
    assert history.by_epoch()["loss"].shape == (0, 3)
    assert "0 steps" in repr(history)


def test_accuracy_is_kept_only_where_every_step_has_one():
    with Recording(2, 2) as run:
        run.keep(Step(0, 0, torch.ones(2), torch.ones(2), 0.1))
        run.keep(Step(1, 0, torch.ones(2), None, 0.1))
    assert run.history.accuracy is None
