"""The faults' explorer without a browser: setting a control fires its callbacks, as a hand would."""

import functools

import pytest

from mbkit import widgets
from mbkit.verify.diagnosis import diagnose_planted
from mbkit.verify.faults import FAULTS


@pytest.fixture
def show(show):
    return functools.partial(show, widgets.explore_faults)


def test_the_drop_down_and_the_sliders_change_what_is_planted_and_drawn(show, facts):
    explorer = show("stale-gradients").wait()
    assert facts(explorer)["guilty"] == "stale-gradients"
    assert "loss is zero" in facts(explorer)["evidence"]
    pictures = [explorer.image.value]
    changes = [("optimizer", "SGD"), ("seed", 3), ("rates", (0.01, 1.0))]
    for name, value in changes:
        getattr(explorer, name).value = value
        pictures.append(explorer.wait().image.value)
        assert facts(explorer)["guilty"] == "stale-gradients"
    assert len({*pictures}) == len(pictures)
    assert explorer.settings["rates"] == (0.01, 0.1, 1.0)


def test_the_line_under_the_picture_reproduces_it(show):
    explorer = show("leaking-update", seed=2, optimizer="SGD").wait()
    picture = eval(explorer.call, {"diagnose_planted": diagnose_planted})
    assert picture.frame() == explorer.image.value
    assert picture.canvas.get_width_height()[0] == 860


def test_the_quiz_tells_nothing_before_the_guess_is_right(show, monkeypatch, facts):
    monkeypatch.setattr("random.choice", lambda names: "mean-loss")
    explorer = show("stale-gradients", quiz=True, optimizer="SGD").wait()
    assert explorer.report.guilty == ["mean-loss"]
    assert "mean-loss" not in explorer.status.value
    assert facts(explorer)["quiz"] == "which fault is it?"
    explorer.guess.value = "stale-gradients"
    assert facts(explorer)["quiz"] == "not stale-gradients; which fault is it?"
    assert "mean-loss" not in explorer.status.value
    explorer.guess.value = "mean-loss"
    assert facts(explorer)["quiz"] == "right!"
    assert facts(explorer)["guilty"] == "mean-loss"
    explorer.quiz.value, explorer.fault.value = False, "none"
    assert facts(explorer.wait())["guilty"] == "none"
    assert explorer.fault.disabled is False


def test_the_quiz_plants_all_faults(show):
    explorer, seen = show("none", quiz=True).wait(), set()
    explorer.worker.close()  # what is planted does not depend on the thread
    for _ in range(80):
        explorer.quiz.value = False
        explorer.quiz.value = True
        seen.add(explorer._planted)
    assert seen == set(FAULTS)


def test_bad_input():
    with pytest.raises(ValueError, match="as fault, got 'mean'"):
        widgets.explore_faults("mean")
