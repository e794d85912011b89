"""Explorers without a browser: setting a slider's value fires its callbacks, as a hand would."""

import io
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mbkit import widgets
from mbkit.figures import curves, plots
from mbkit.lessons import consistency


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# explore_consistency


def test_it_opens_on_the_published_table(show, facts):
    explorer = show(widgets.explore_consistency).wait()
    assert explorer.outcome.table() == consistency.PUBLISHED
    assert facts(explorer)["verdict"] == "DIVERGENT"
    assert facts(explorer)["largest-difference"] == "9.3%"


@pytest.mark.parametrize(
    ("control", "value", "setting", "expected"),
    [
        ("seed", 7, "seed", 7),
        ("models", 2, "learning_rates", (0.001, 0.1)),
        ("rates", (0.01, 1.0), "learning_rates", (0.01, 0.1, 1.0)),
        ("optimizer", "SGD", "optimizer", "SGD"),
        ("preset", "quick", "epochs", 5),
    ],
)
def test_a_control_changes_what_is_trained_and_what_is_drawn(show, control, value, setting, expected):
    explorer = show(widgets.explore_consistency).wait()
    before = explorer.image.value
    getattr(explorer, control).value = value
    assert getattr(explorer.wait().outcome.demo, setting) == expected
    assert explorer.image.value != before
    settings = explorer.settings
    switches = [settings.pop(name) for name in ("gradients", "weights", "order")]
    expected = consistency.run(consistency.preset(**{"name": settings.pop("preset"), **settings}), *switches)
    assert torch.equal(explorer.outcome.accuracy_batched, expected.accuracy_batched)


def test_its_drop_downs_take_the_causes_away_one_by_one(show, facts):
    explorer = show(widgets.explore_consistency).wait()
    for name, value in {"gradients": "cleared", "weights": "same", "order": "same"}.items():
        assert facts(explorer)["faults"] != "none"
        explorer.switches[name].value = value
        explorer.wait()
    assert facts(explorer)["faults"] == "none"
    assert explorer.outcome.verdict == "CONSISTENT"


def test_the_line_under_the_picture_reproduces_it(show):
    explorer = show(widgets.explore_consistency, "quick", weights="same", seed=3).wait()
    explorer.models.value = 4
    explorer.wait()
    picture = eval(explorer.call, {"plots": plots, "consistency": consistency})
    assert picture.frame() == explorer.image.value


def test_a_presets_own_rates_are_kept(show):
    explorer = show(widgets.explore_consistency, learning_rates=[0.02, 0.01, 0.05]).wait()
    assert explorer.outcome.demo.learning_rates == (0.02, 0.01, 0.05)


def test_settings_without_a_control_are_kept_too(show):
    explorer = show(widgets.explore_consistency, epochs=4, samples=60).wait()
    assert len(explorer.outcome.parameter_difference) == 4 * 3
    picture = eval(explorer.call, {"plots": plots, "consistency": consistency})
    assert picture.frame() == explorer.image.value


def test_an_exception_is_shown_and_goes_away(show, monkeypatch, facts):
    explorer = show(widgets.explore_consistency).wait()

    def fail(*_, **__):
        raise RuntimeError("the disk is <full>")

    monkeypatch.setattr(consistency, "walk", fail)
    explorer.seed.value = 1
    with pytest.raises(RuntimeError, match="full"):
        explorer.wait()
    assert facts(explorer)["state"] == "failed"
    assert "the disk is &lt;full&gt;" in explorer.status.value
    monkeypatch.undo()
    explorer.seed.value = 2
    explorer.wait()
    assert facts(explorer)["state"] == "idle"
    assert "RuntimeError" not in explorer.status.value


def test_what_is_out_of_date_is_dimmed(show, monkeypatch, facts):
    explorer = show(widgets.explore_consistency).wait()
    gate, walk = threading.Event(), consistency.walk
    monkeypatch.setattr(consistency, "walk", lambda *args: gate.wait(10) and walk(*args))
    assert "mbkit-outdated" not in explorer.image._dom_classes
    explorer.seed.value = 1
    assert "mbkit-outdated" in explorer.image._dom_classes
    assert facts(explorer)["state"] == "running"
    gate.set()
    explorer.wait()
    assert "mbkit-outdated" not in explorer.image._dom_classes


def test_bad_settings_are_refused_at_once():
    with pytest.raises(ValueError, match="Did you mean 'published'"):
        widgets.explore_consistency("publishd")
    with pytest.raises(ValueError, match="stale or cleared as gradients, got 'old'"):
        widgets.explore_consistency(gradients="old")
    with pytest.raises(ValueError, match="build and batches"):
        widgets.explore_learning_rates(nn.Linear)


# explore_learning_rates


def alone(build, batches, rate, seed, steps):
    """Losses [steps] of one model in plain PyTorch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for x, y in (batches * steps)[:steps]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def own():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 5, generator=generator), torch.arange(8) % 3) for _ in range(4)]


def test_ones_own_models_train_as_they_do_alone(show):
    def build():
        return nn.Linear(5, 3)

    settings = {"rates": (0.01, 1.0), "num_rates": 3, "num_seeds": 2, "steps": 10}
    explorer = show(widgets.explore_learning_rates, build, own(), **settings).wait()
    expected = [alone(build, own(), rate, seed, 10) for rate in (0.01, 0.1, 1.0) for seed in (0, 1)]
    torch.testing.assert_close(explorer.loss, torch.stack(expected, 1), rtol=1e-4, atol=1e-5)
    assert explorer.call.startswith("explore_learning_rates(build, batches, rates=(0.01, 1.0)")


def test_highlighting_does_not_train_again(show, facts):
    explorer = show(widgets.explore_learning_rates, num_rates=3, num_seeds=2, steps=10).wait()
    generation, before, loss = explorer.worker.generation, explorer.image.value, explorer.loss.clone()
    explorer.rate.index = 0
    explorer.seed.value = 1
    explorer.wait()
    assert explorer.worker.generation == generation
    assert torch.equal(explorer.loss, loss)
    assert explorer.chosen == 1
    assert explorer.image.value != before
    assert facts(explorer)["loss"] == f"{loss[-1, 1].item():.4g}"


def test_a_highlight_paints_only_what_it_changes(show, monkeypatch):
    explorer = show(widgets.explore_learning_rates, steps=20).wait()
    whole, pictures = [], {explorer.image.value}
    monkeypatch.setattr(explorer.curves.picture, "draw", lambda *args: whole.append(args))
    for index in range(9):
        explorer.rate.index = index
        pictures.add(explorer.wait().image.value)
    assert whole == []  # the axes, labels and grid are kept from the last frame of the training
    assert len(pictures) == 9


def test_changing_the_grid_trains_anew(show, facts):
    explorer = show(widgets.explore_learning_rates, num_rates=3, num_seeds=2, steps=10).wait()
    explorer.num_seeds.value = 4
    explorer.num_rates.value = 5
    explorer.rates.value = (0.01, 1.0)
    explorer.optimizer.value = "Adam"
    explorer.wait()
    assert explorer.loss.shape == (10, 20)
    assert explorer.seed.max == 3
    assert [rate for _, rate in explorer.rate.options] == [0.01, 0.0316, 0.1, 0.316, 1.0]
    assert facts(explorer)["models"] == "20"
    assert "'Adam'" in explorer.call


def test_pause_step_reset_and_stop(show, facts):
    explorer = show(widgets.explore_learning_rates, num_rates=2, num_seeds=1, steps=100_000)
    until(lambda: explorer.done > 3)
    explorer.pause.value = True
    explorer.wait()
    done = explorer.done
    assert facts(explorer)["state"] == "paused"
    assert facts(explorer)["step"] == str(done)
    explorer.step_button.click()
    explorer.wait()
    assert explorer.done == done + 1
    explorer.pause.value = False
    until(lambda: explorer.done > done + 3)
    explorer.stop_button.click()
    explorer.wait()
    assert facts(explorer)["state"] == "stopped"
    assert explorer.done < 100_000
    generation = explorer.worker.generation
    explorer.reset_button.click()
    assert explorer.worker.generation == generation + 1
    assert explorer.worker.state == "running"
    explorer.stop_button.click()


def test_an_explorer_that_is_paused_at_once_shows_its_first_step(show, facts):
    explorer = show(widgets.explore_learning_rates, num_rates=2, num_seeds=1, steps=100_000)
    explorer.pause.value = True
    explorer.wait()
    assert facts(explorer)["state"] == "paused"
    assert int(facts(explorer)["step"]) >= 1
    assert "image/png" in explorer._repr_mimebundle_()


def test_what_diverged_is_counted(show, facts):
    explorer = show(widgets.explore_learning_rates, rates=(0.001, 10.0), num_rates=2, num_seeds=3, steps=30).wait()
    lost = curves.diverged(explorer.loss, explorer.curves.window)
    assert not lost[:3].any()
    assert lost[3:].any()
    assert facts(explorer)["diverged"] == str(int(lost.sum()))


def test_torchs_default_generator_stays_where_it_was(show):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    show(widgets.explore_learning_rates, num_rates=2, num_seeds=2, steps=3).wait()
    show(widgets.explore_consistency).wait()
    assert torch.equal(torch.get_rng_state(), state)


# Pages without a kernel


@pytest.mark.parametrize("explore", [widgets.explore_consistency, widgets.explore_learning_rates])
def test_a_page_without_a_kernel_has_the_picture(show, explore, facts):
    import base64

    explorer = show(explore)
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    image = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert image.size == (860, 320)
    assert facts(explorer)["state"] == "idle"


def test_live_curves_draw_what_the_callback_is_given(monkeypatch):
    from mbkit.training import Step
    from mbkit.widgets import explorer

    shown = []
    handle = type("Handle", (), {"update": lambda self, image: shown.append(image.data)})()
    monkeypatch.setattr(explorer, "display", lambda **_: handle)
    show = widgets.live_curves([0.1, 1.0], steps=3)
    for index in range(3):
        assert show(Step(index, 0, torch.tensor([1.0, 2.0]), None, 0.0)) is None  # False would end the training
    assert len(shown) >= 2
    assert all(Image.open(io.BytesIO(png)).size == (860, 320) for png in shown)
