"""The map of learning rates: every pixel is the network that plain PyTorch trains alone, and the explorer shows it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mbkit import widgets
from mbkit.figures import plots
from mbkit.lessons import trainability
from mbkit.lessons.trainability import RateGrid, Trainability, TwoLayers, points

X, Y = (tensor.double() for tensor in points()[0])


@pytest.fixture
def show(show):
    return functools.partial(show, widgets.explore_trainability)


def alone(first, second, steps, cls=torch.optim.SGD, seed=3, **hyperparameters):
    """Losses [steps] of one network in plain PyTorch, with torch's own parameter groups."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TwoLayers().double()
    groups = [{"params": [model.first], "lr": first}, {"params": [model.second], "lr": second}]
    optimizer = cls(groups, **hyperparameters)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float32)  # as the map keeps them


@pytest.mark.parametrize(
    ("cls", "hyperparameters"), [(torch.optim.SGD, {"momentum": 0.5}), (torch.optim.Adam, {"eps": 1e-3})]
)
def test_every_pixel_is_the_network_trained_alone_also_when_the_grid_is_used_again(cls, hyperparameters):
    grid = RateGrid(lambda: TwoLayers().double(), [(X, Y)], size=3, seed=3, optimizer_cls=cls, **hyperparameters)
    for window in ((0.01, 0.1), (0.02, 0.2)), ((0.03, 0.3), (0.01, 0.05)):
        *_, outcome = grid.train(*window, steps=25)
        assert outcome.loss.shape == (25, 3, 3)
        for row, second in enumerate(trainability.spaced(*window[1], 3).tolist()):
            for column, first in enumerate(trainability.spaced(*window[0], 3).tolist()):
                expected = alone(first, second, 25, cls, **hyperparameters)
                torch.testing.assert_close(
                    outcome.loss[:, row, column], expected, rtol=2e-7, atol=0
                )  # float32's last bit


def test_what_counts_as_diverged_and_as_trained():
    loss = torch.ones(2, 2, 3)
    loss[1] = torch.tensor([[0.4, 0.6, 1.2], [1.3, float("nan"), float("inf")]])
    outcome = Trainability(torch.ones(3), torch.ones(2), loss, 2)
    assert outcome.trained.tolist() == [[True, False, False], [False, False, False]]
    assert outcome.diverged.tolist() == [[False, False, False], [True, True, True]]


def test_the_map_goes_from_slow_to_diverged_and_torchs_generator_stays():
    state = torch.get_rng_state()
    outcome = trainability.trainability(size=12)
    assert torch.equal(torch.get_rng_state(), state)
    assert not outcome.diverged[0].any()
    assert outcome.diverged[-1].all()
    assert outcome.trained.any()


@pytest.mark.parametrize("rates", [(0.0, 1.0), (1.0, 0.1), (1.0, float("inf"))])
def test_impossible_ranges_are_refused(rates):
    with pytest.raises(ValueError, match="lowest and the highest rate"):
        trainability.trainability(rates, size=2)
    with pytest.raises(ValueError, match="lowest and the highest rate"):
        widgets.explore_trainability(second_rates=rates)
    with pytest.raises(ValueError, match="both build and batches"):
        widgets.explore_trainability(TwoLayers)


# The figure, and the explorer


def test_the_figure_shows_each_loss_in_its_place_and_leaves_out_what_diverged():
    outcome = trainability.trainability(size=6, steps=30)
    image = plots.trainability(outcome, (1, 4)).axes[0].images[0].get_array()
    lost = outcome.diverged
    assert image.mask.tolist() == lost.tolist() if image.mask.any() else not lost.any()
    expected = outcome.ratio.double().clamp(min=1e-5).log10()[~lost]
    torch.testing.assert_close(torch.from_numpy(image.data)[~lost], expected)


def test_its_sliders_train_and_mark(show, facts):
    explorer = show(size=16, steps=20).wait()
    before, generation = explorer.image.value, explorer.worker.generation
    explorer.first.value, explorer.second.value = 0.0, 1.0
    explorer.wait()
    assert explorer.worker.generation == generation  # a mark only
    assert explorer.chosen == (15, 0)
    assert facts(explorer)["first-rate"] == "0.01"
    assert facts(explorer)["second-rate"] == "10"
    assert explorer.image.value != before
    explorer.seed.value = 1
    explorer.optimizer.value = "Adam"
    explorer.size.value = 32
    outcome = explorer.wait().outcome
    expected = trainability.trainability(size=32, steps=20, seed=1, optimizer_cls=torch.optim.Adam)
    torch.testing.assert_close(outcome.loss, expected.loss, equal_nan=True)
    assert facts(explorer)["networks"] == "1024"
    assert facts(explorer)["diverged"] == str(int(expected.diverged.sum()))


def test_the_zoom_halves_the_window_around_the_mark_and_goes_back(show):
    explorer = show(size=16, steps=5).wait()
    explorer.first.value = 0.75
    rate = 10 ** (0.75 * 4 - 2)
    explorer.zoom.value = 1
    (low, high), _ = explorer.wait().window
    assert low * high == pytest.approx(rate**2)
    assert high / low == pytest.approx(100)  # of four decades, two
    assert explorer.chosen == (8, 8)
    assert explorer.outcome.first_rates[0].item() == pytest.approx(low)
    explorer.zoom.value = 0
    assert explorer.window == trainability.WINDOW


def test_a_fine_map_has_a_coarse_one_before_it(show, monkeypatch):
    sizes = []
    train = RateGrid.train
    monkeypatch.setattr(RateGrid, "train", lambda self, *args: sizes.append(self.size) or train(self, *args))
    show(size=64, steps=2).wait()
    assert sizes == [16, 64]


def test_the_line_under_the_picture_reproduces_it(show):
    explorer = show(size=16, steps=10, momentum=0.5, seed=2).wait()
    explorer.zoom.value = 2
    loss = explorer.wait().outcome.loss
    again = eval(explorer.call, {"explore_trainability": show}).wait()
    assert torch.equal(again.outcome.loss.nan_to_num(), loss.nan_to_num())


def test_ones_own_model_and_groups(show):
    def build():
        return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))

    batches = [(torch.randn(6, 5), torch.arange(6) % 3)]
    settings = {"loss_fn": F.cross_entropy, "groups": ("0", "*"), "size": 3, "steps": 4}
    explorer = show(build, batches, first_rates=(0.1, 10.0), second_rates=(0.01, 0.1), **settings).wait()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 10.0}, {"params": model[2].parameters(), "lr": 0.01}]
    )
    for step in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(explorer.outcome.loss[step, 0, 2], loss.detach(), rtol=1e-4, atol=1e-5)
    assert "explore_trainability(build, batches, " in explorer.call
    assert "groups=('0', '*')" in explorer.call
