"""The explorers without a browser: setting a control fires its callbacks, as a hand would."""

import base64
import gc
import html
import io
import threading
import time
import weakref

import nbformat
import pytest
import torch
import torch.nn.functional as F
from ipywidgets.widgets.widget import _instances as OPEN
from nbclient import NotebookClient
from oracle import train_alone
from PIL import Image
from torch import nn

from mbkit import widgets
from mbkit.figures import curves
from mbkit.lessons import consistency
from mbkit.lessons.trainability import WINDOW, RateGrid
from mbkit.training import Step
from mbkit.verify.faults import FAULTS
from mbkit.widgets import controls, explorer
from mbkit.widgets.controls import MOST_LOSSES

SMALL = {
    "explore_consistency": {"epochs": 2},
    "explore_faults": {"fault": "mean-loss", "optimizer": "SGD"},
    "explore_learning_rates": {"num_rates": 3, "num_seeds": 2, "steps": 10, "momentum": 0.5},
    "explore_trainability": {"size": 16, "steps": 10, "momentum": 0.5},
}
# Each control, and what its value becomes; those after the bar only mark, so nothing is trained again.
TRAINS = {
    "explore_consistency": {
        "seed": 7, "models": 2, "rates": (0.01, 1.0), "optimizer": "SGD", "gradients": "cleared", "weights": "same",
        "order": "same", "preset": "full",
    },
    "explore_faults": {"optimizer": "Adam", "seed": 3, "rates": (0.01, 1.0), "fault": "leaking-update"},
    "explore_learning_rates": {"num_seeds": 4, "num_rates": 5, "rates": (0.01, 1.0), "optimizer": "Adam"},
    "explore_trainability": {"seed": 1, "optimizer": "Adam", "size": 32, "zoom": 1},
}  # fmt: skip
MARKS = {"explore_learning_rates": {"rate": 0.0316, "seed": 1}, "explore_trainability": {"first": 0.0, "second": 1.0}}

every_explorer = pytest.mark.parametrize("name", SMALL)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def again(show, shown):
    """Open what the line of code opens, where only `widgets` is known."""
    assert f"<code>{html.escape(shown.call)}</code>" in shown.status.value
    opened = []
    names = {"widgets": type("widgets", (), {name: lambda *a, n=name, **k: opened.append((n, a, k)) for name in SMALL})}
    exec(shown.call, names)
    ((name, args, settings),) = opened
    return show(getattr(widgets, name), *args, **settings).wait()


@every_explorer
def test_each_control_changes_the_picture_and_the_line_of_code_reproduces_it(show, name):
    shown = show(getattr(widgets, name), **SMALL[name]).wait()
    height = int(shown.image._dom_classes[-1].removeprefix("mbkit-"))
    assert Image.open(io.BytesIO(shown.image.value)).size == (860, height)
    for control, value in {**TRAINS[name], **MARKS.get(name, {})}.items():
        before, generation = shown.image.value, shown.worker.generation
        getattr(shown, control).value = value
        assert shown.wait().image.value != before, control
        assert (shown.worker.generation == generation) == (control in MARKS.get(name, {})), control
    assert again(show, shown).image.value == shown.image.value, shown.call


@every_explorer
def test_a_closed_explorer_leaves_no_thread_no_widget_and_no_memory(name):
    gc.collect()
    threads, open_widgets = threading.active_count(), len(OPEN)
    shown = getattr(widgets, name)(**SMALL[name]).wait()
    assert len(OPEN) > open_widgets
    kept = [weakref.ref(thing) for thing in (shown, shown.worker, shown.image, shown.status)]
    picture = shown.image.value
    shown.close()
    shown.close()  # twice is harmless
    assert shown.image.value == picture
    assert threading.active_count() == threads
    assert len(OPEN) == open_widgets
    del shown
    gc.collect()
    assert [each() for each in kept] == [None] * len(kept)


@every_explorer
def test_a_page_without_a_kernel_has_the_picture_and_one_with_a_kernel_its_words(show, name, facts):
    state = torch.get_rng_state()
    shown = show(getattr(widgets, name), **SMALL[name])
    bundle = shown._repr_mimebundle_()
    assert torch.equal(torch.get_rng_state(), state)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width == 860
    assert facts(shown)["state"] == "idle"
    assert html.escape(shown.shows) in shown.children[0].value  # which the page makes its alt text


@every_explorer
def test_a_cell_that_runs_again_closes_what_it_has_opened_before(show, name, monkeypatch):
    if name != "explore_learning_rates":
        monkeypatch.setattr(widgets.worker.Worker, "request", lambda *_: None)

    def run(cell, message):
        request = {"metadata": {"cellId": cell}, "header": {"msg_id": message}}
        monkeypatch.setattr(explorer, "get_ipython", lambda: type("Shell", (), {"get_parent": lambda: request}))
        return show(getattr(widgets, name), **SMALL[name])

    first, beside, elsewhere = run("a", "1"), run("a", "1"), run("b", "2")
    assert [each.worker.state for each in (first, beside, elsewhere)].count("stopped") == 0
    run("a", "3")
    assert [each.comm is None for each in (first, beside, elsewhere)] == [True, True, False]
    assert [each.worker.state == "stopped" for each in (first, beside, elsewhere)] == [True, True, False]


# What all have: buttons, errors, dimming


def test_pause_step_reset_and_stop_say_when_they_act(show, facts):
    shown = show(widgets.explore_learning_rates, num_rates=2, num_seeds=1, steps=100_000)
    acting = {name: button.click for name, button in shown.buttons.items()}

    def able():
        return {name for name, button in shown.buttons.items() if not button.disabled}

    until(lambda: len(shown.loss) > 3)
    assert able() == {"pause", "step", "reset", "stop"}
    acting["pause"]()
    done = len(shown.wait().loss)
    assert facts(shown)["state"] == "paused"
    assert facts(shown)["step"] == str(done)
    assert shown.buttons["pause"].description == "Go on"
    acting["step"]()
    assert len(shown.wait().loss) == done + 1
    acting["pause"]()
    until(lambda: len(shown.loss) > done + 3)
    acting["stop"]()
    shown.wait()
    assert facts(shown)["state"] == "stopped"
    assert len(shown.loss) < 100_000
    assert able() == {"step", "reset"}
    acting["step"]()  # begins anew, with one step
    assert len(shown.wait().loss) == 1
    assert facts(shown)["state"] == "paused"
    acting["step"]()
    assert len(shown.wait().loss) == 2
    generation = shown.worker.generation
    acting["reset"]()
    assert (shown.worker.generation, shown.worker.state) == (generation + 1, "running")
    shown.request(paused=True)
    assert len(shown.wait().loss) == 1
    assert "image/png" in shown._repr_mimebundle_()


def test_an_exception_is_shown_and_goes_away_and_what_is_out_of_date_is_dimmed(show, monkeypatch, facts):
    shown = show(widgets.explore_consistency).wait()
    assert facts(shown)["verdict"] == "DIVERGENT"
    assert facts(shown)["largest-difference"] == "9.3%"
    assert shown.outcome.table() == consistency.PUBLISHED

    def fail(*_, **__):
        raise RuntimeError("the disk is <full>")

    walk, gate = consistency.walk, threading.Event()
    monkeypatch.setattr(consistency, "walk", fail)
    shown.seed.value = 1
    with pytest.raises(RuntimeError, match="full"):
        shown.wait()
    assert facts(shown)["state"] == "failed"
    assert "the disk is &lt;full&gt;" in shown.status.value
    monkeypatch.setattr(consistency, "walk", lambda *args: gate.wait(10) and walk(*args))
    shown.seed.value = 2
    assert "mbkit-outdated" in shown.image._dom_classes
    assert facts(shown)["state"] == "running"
    assert not shown.worker.wait(0.05)  # it trains in a thread of its own, and whoever asks goes on at once
    gate.set()
    shown.wait()
    assert "mbkit-outdated" not in shown.image._dom_classes
    assert facts(shown)["state"] == "idle"
    assert "RuntimeError" not in shown.status.value


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("consistency", {"preset": "publishd"}, "Did you mean 'published'"),
        ("consistency", {"gradients": "old"}, "stale or cleared as gradients, got 'old'"),
        ("consistency", {"learning_rates": [0.1] * 7}, "models M from 1 to 6, got 7"),
        ("consistency", {"learning_rates": [0.0, 0.1]}, "lowest and the highest rate, both above 0"),
        ("consistency", {"seed": 101}, "seed from 0 to 100, got 101"),
        ("faults", {"fault": "mean"}, "as fault, got 'mean'"),
        ("faults", {"rates": (0, 1)}, "lowest and the highest rate, both above 0, got 0, 1"),
        ("faults", {"seed": -1}, "at least 0 as seed, got -1"),
        ("learning_rates", {"build": nn.Linear}, "both build and batches"),
        ("learning_rates", {"num_rates": 33}, "num_rates from 1 to 32, got 33"),
        ("learning_rates", {"num_seeds": 99}, "num_seeds from 1 to 16, got 99"),
        ("learning_rates", {"num_seeds": 0}, "at least 1 as num_seeds, got 0"),
        ("learning_rates", {"steps": MOST_LOSSES}, "steps for 36 networks"),
        ("learning_rates", {"rates": (0, 1)}, "rates as the lowest and the highest rate, both above 0"),
        ("learning_rates", {"rates": (0.1, float("nan"))}, "rates as the lowest and the highest rate"),
        ("learning_rates", {"mark": (0.0, 0)}, "a rate above 0 as the mark's, got 0.0"),
        ("learning_rates", {"mark": (0.1, 9)}, "show seed from 0 to 3, got 9"),
        ("learning_rates", {"momentun": 0.9}, "hyperparameters of SGD, got 'momentun'. Did you mean 'momentum'"),
        ("trainability", {"build": nn.Linear}, "both build and batches"),
        ("trainability", {"size": 10**5}, "at most 65,536 networks, got 10,000,000,000"),
        ("trainability", {"size": 0}, "at least 1 as size, got 0"),
        ("trainability", {"size": 128, "steps": 10**6}, "at most 16,384 steps for 16,384 networks"),
        ("trainability", {"steps": 0}, "at least 1 as steps"),
        ("trainability", {"seed": 101}, "seed from 0 to 100, got 101"),
        ("trainability", {"first_rates": (0, 1)}, "first_rates as the lowest and the highest rate.*0, 1"),
        ("trainability", {"second_rates": (1.0, 0.1)}, "second_rates as the lowest and the highest rate"),
        ("trainability", {"second_rates": (1.0, float("inf"))}, "second_rates as the lowest and the highest rate"),
        ("trainability", {"momentun": 0.9}, "hyperparameters of SGD, got 'momentun'"),
    ],
)
def test_what_cannot_be_shown_is_refused_at_once(name, settings, message):
    threads = threading.active_count()
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(widgets, f"explore_{name}")(**settings)
    assert threading.active_count() == threads


def test_a_line_of_code_names_what_the_notebook_names(show, monkeypatch):
    def build():
        return nn.Linear(5, 3)

    points = own()
    shell = type("Shell", (), {"user_ns": {"_": points, "points": points, "readers": build}})
    monkeypatch.setattr(controls, "get_ipython", lambda: shell)
    settings = {"num_rates": 2, "num_seeds": 1, "steps": 2}
    assert "(readers, points, rates=" in show(widgets.explore_learning_rates, build, points, **settings).call
    unusual = {"loss_fn": F.cross_entropy, "size": 2, "groups": ("weight", "bias")}
    call = show(widgets.explore_trainability, lambda: build(), points, **unusual).call
    assert call.startswith("widgets.explore_trainability(<lambda>, points, loss_fn=torch.nn.functional.cross_entropy, ")
    assert "groups=('weight', 'bias')" in call
    monkeypatch.setattr(controls, "get_ipython", lambda: None)
    assert "(build, <list>, rates=" in show(widgets.explore_learning_rates, build, points, **settings).call


def test_in_a_notebook_the_line_of_code_runs_with_the_notebooks_own_names():
    first = """import torch
from mbkit import widgets
def Reader():
    return torch.nn.Linear(5, 3)
single = [(torch.randn(6, 5), torch.arange(6) % 3)]
loss = lambda outputs, targets: torch.nn.functional.cross_entropy(outputs, targets)"""
    shown = """shown = widgets.explore_{}(Reader, single, loss_fn=loss, {}, steps=3).wait()
again = eval(shown.call).wait()
assert again.image.value == shown.image.value
assert again.worker.state == "idle"
print(shown.call)"""
    grids = {"learning_rates": "num_rates=2", "trainability": "size=2, groups=('weight', '*')"}
    sources = [first, *(shown.format(name, settings) for name, settings in grids.items())]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    for cell in notebook.cells[1:]:
        assert "(Reader, single, loss_fn=loss, " in cell.outputs[0].text


# explore_consistency


def test_a_demos_own_rates_are_kept_and_a_preset_brings_its_own(show):
    shown = show(widgets.explore_consistency, learning_rates=[0.02, 0.01, 0.05], epochs=1).wait()
    assert shown.outcome.demo.learning_rates == (0.02, 0.01, 0.05)
    shown.preset.value = "full"
    demo = shown.wait().outcome.demo
    assert demo.learning_rates == consistency.PRESETS["full"].learning_rates
    assert (shown.models.value, shown.rates.value, demo.sizes, demo.epochs) == (4, (0.001, 0.03), (20, 16, 16, 4), 1)


def test_its_drop_downs_take_the_causes_away_one_by_one(show, facts):
    shown = show(widgets.explore_consistency).wait()
    for name, value in {"gradients": "cleared", "weights": "same", "order": "same"}.items():
        assert facts(shown)["faults"] != "none"
        getattr(shown, name).value = value
        shown.wait()
    assert facts(shown)["faults"] == "none"
    assert shown.outcome.verdict == "CONSISTENT"


# explore_faults


def test_the_quiz_tells_what_clears_a_wrong_guess_and_nothing_more_before_the_right_one(show, monkeypatch, facts):
    monkeypatch.setattr("random.choice", lambda names: "mean-loss" if "mean-loss" in names else "leaking-update")
    shown = show(widgets.explore_faults, "stale-gradients", quiz=True, optimizer="SGD").wait()
    findings = shown.report.findings

    def said():
        return html.unescape(shown.wait().status.value)

    assert shown.report.guilty == ["mean-loss"]
    assert facts(shown)["quiz"] == "which fault is it?"
    assert "mean-loss" not in said()
    assert findings["mean-loss"].evidence not in said()
    shown.guess.value = "stale-gradients"
    assert findings["stale-gradients"].evidence in said()
    assert "mean-loss" not in said()
    shown.clue.value = True
    assert findings["mean-loss"].evidence in said()
    assert "mean-loss" not in said()
    shown.guess.value = "mean-loss"
    assert "right!" in said()
    assert facts(shown)["guilty"] == "mean-loss"
    shown.another.click()
    assert shown.wait().report.guilty == ["leaking-update"]
    assert (shown.guess.value, shown.clue.value) == ("?", False)
    shown.quiz.value, shown.fault.value = False, "none"
    assert facts(shown.wait())["guilty"] == "none"
    assert (shown.fault.disabled, shown.another.disabled) == (False, True)


def test_the_quiz_plants_all_faults_and_names_each_in_words(show):
    shown, seen = show(widgets.explore_faults, "none", quiz=True).wait(), set()
    shown.worker.close()  # what is planted does not depend on the thread
    for _ in range(150):
        shown.another.click()
        seen.add(shown.settings["fault"])
    assert seen == set(FAULTS)
    words = {value: word for word, value in shown.guess.options}
    assert set(words) == {"?", *FAULTS}
    assert not any(word in FAULTS for word in words.values())


# explore_learning_rates


def own():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 5, generator=generator), torch.arange(8) % 3) for _ in range(4)]


def test_ones_own_models_train_as_they_do_alone(show, facts):
    def build():
        return nn.Linear(5, 3)

    settings = {"rates": (0.01, 100.0), "num_rates": 3, "num_seeds": 2, "steps": 10}
    shown = show(widgets.explore_learning_rates, build, own(), **settings).wait()
    models, configs = [], []
    for rate in (0.01, 1.0, 100.0):
        for seed in (0, 1):
            torch.manual_seed(seed)
            models.append(build())
            configs.append({"lr": rate})
    expected = train_alone(models, (own() * 3)[:10], loss_fn=F.cross_entropy, seeds=None, configs=configs).float()
    torch.testing.assert_close(shown.loss, expected, rtol=1e-3, atol=1e-4)
    lost = curves.diverged(shown.loss, shown.curves.window)
    assert lost.tolist() == [False] * 4 + [True] * 2
    assert facts(shown)["diverged"] == "2"


def test_another_optimizer_gets_the_hyperparameters_that_it_has(show):
    shown = show(widgets.explore_learning_rates, num_rates=2, num_seeds=1, steps=3, momentum=0.9).wait()
    for optimizer, named in {"Adam": False, "RMSprop": True, "Adagrad": False, "NAdam": False, "SGD": True}.items():
        shown.optimizer.value = optimizer
        assert shown.wait().worker.error is None
        assert ("momentum=0.9" in shown.call) == named


def test_a_highlight_paints_only_what_it_changes_and_a_click_picks_a_rate(show, monkeypatch, facts):
    shown = show(widgets.explore_learning_rates, steps=20).wait()
    whole, pictures, loss = [], {shown.image.value}, shown.loss.clone()
    monkeypatch.setattr(shown.curves.picture, "draw", lambda *args: whole.append(args))
    for index in range(9):
        shown.rate.index = index
        pictures.add(shown.wait().image.value)
        assert facts(shown)["loss"] == f"{loss[-1, 4 * index].item():.4g}"
    assert whole == []  # the axes, labels and grid are kept from the last frame of the training
    assert len(pictures) == 9
    box = shown.curves.right.get_position()
    click(shown, box.x0 + 0.5 * box.width, 0.5)
    assert shown.rate.index == 4  # the middle
    click(shown, 0.1, 0.5)  # in the other panel
    assert shown.rate.index == 4


def click(shown, across, down):
    """What the page writes when somebody clicks on the picture."""
    (field,) = [each for each in shown.children if "mbkit-click" in each._dom_classes]
    field.value = f"{across} {down} {time.time()}"
    shown.wait()


def test_models_that_do_not_fit_into_memory_are_refused_before_they_are_built(show, monkeypatch):
    built = []

    def build():
        built.append(nn.Linear(100, 100))
        return built[-1]

    monkeypatch.setattr("mbkit.models.free_memory", lambda device: 1_000_000)
    batches = [(torch.randn(4, 100), torch.arange(4))]
    shown = show(widgets.explore_learning_rates, build, batches, num_rates=4, num_seeds=2, steps=2)
    with pytest.raises(ValueError, match=r"at most 6 models of 0\.0404 MB, as many as memory is for, got 8"):
        shown.wait()
    assert len(built) == 1


def test_live_curves_draw_what_the_callback_is_given(monkeypatch):
    shown = []
    handle = type("Handle", (), {"update": lambda self, image: shown.append(image.data)})()
    monkeypatch.setattr(explorer, "display", lambda **_: handle)
    show = widgets.live_curves([0.1, 1.0], steps=3)
    for index in range(3):
        assert show(Step(index, 0, torch.tensor([1.0, 2.0]), None, 0.0)) is None  # False would end the training
    assert len(shown) >= 2
    assert all(Image.open(io.BytesIO(png)).size == (860, 320) for png in shown)


# explore_trainability


def test_it_shows_the_map_that_is_trained_without_it(show, facts):
    shown = show(widgets.explore_trainability, size=16, steps=20, seed=1, optimizer="Adam").wait()
    *_, expected = RateGrid(size=16, seed=1, optimizer_cls=torch.optim.Adam).train(*WINDOW, steps=20)
    torch.testing.assert_close(shown.outcome.loss, expected.loss, equal_nan=True)
    assert facts(shown)["networks"] == "256"
    assert facts(shown)["diverged"] == str(int(expected.diverged.sum()))
    shown.first.value, shown.second.value = 0.0, 1.0
    assert shown.wait().chosen == (15, 0)
    assert (facts(shown)["first-rate"], facts(shown)["second-rate"]) == ("0.01", "10")
    box = shown.map.left.get_position()
    click(shown, box.x0 + 0.99 * box.width, 1 - box.y0 - 0.01 * box.height)
    assert shown.chosen == (0, 15)


def on_edge(shown):
    lost, (row, column) = shown.outcome.diverged, shown.chosen
    beside = [(row + 1, column), (row, column + 1)]
    return any(lost[place] != lost[row, column] for place in beside if max(place) < len(lost))


def test_the_zoom_finds_more_of_the_edge_each_time_without_a_move_and_goes_back(show):
    shown = show(widgets.explore_trainability, size=32, steps=30).wait()
    for zoom in range(1, 5):
        assert on_edge(shown)
        (low, high), _ = shown.window
        rate = shown.outcome.first_rates[shown.chosen[1]].item()
        shown.zoom.value = zoom
        (left, right), _ = shown.wait().window
        assert left * right == pytest.approx(rate**2)  # around the mark
        assert right / left == pytest.approx((high / low) ** 0.5)  # half as wide on a log scale
        assert 0 < shown.outcome.diverged.sum() < 1024
    shown.seed.value = 1
    shown.zoom.value = 5
    shown.first.value = shown.second.value = 0.0  # a mark that a hand has moved stays, also while it trains
    assert shown.wait().chosen == (0, 0)
    shown.zoom.value = 0
    assert shown.window == WINDOW


def test_a_fine_map_has_a_coarse_one_before_it_and_a_size_too_large_is_refused(show, monkeypatch):
    sizes, train = [], RateGrid.train
    monkeypatch.setattr(RateGrid, "train", lambda self, *args: sizes.append(self.size) or train(self, *args))
    shown = show(widgets.explore_trainability, size=64, steps=2).wait()
    assert sizes == [16, 64]
    shown.steps = MOST_LOSSES // 128**2 + 1
    shown.size.value = 128
    with pytest.raises(ValueError, match="steps for 16,384 networks"):
        shown.wait()


def test_ones_own_model_and_groups(show):
    def build():
        return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))

    settings = {"loss_fn": F.cross_entropy, "groups": ("0", "*"), "size": 3, "steps": 4}
    rates = {"first_rates": (0.1, 10.0), "second_rates": (0.01, 0.1)}
    shown = show(widgets.explore_trainability, build, own(), **rates, **settings).wait()
    torch.manual_seed(0)
    model = build()
    groups = [{"params": model[0].parameters(), "lr": 10.0}, {"params": model[2].parameters(), "lr": 0.01}]
    how = {"seeds": None, "optimizer_cls": lambda _: torch.optim.SGD(groups), "configs": {}}
    expected = train_alone([model], own(), loss_fn=F.cross_entropy, **how)[:, 0].float()
    torch.testing.assert_close(shown.outcome.loss[:, 0, 2], expected, rtol=1e-4, atol=1e-5)
