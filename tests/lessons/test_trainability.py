"""The map of learning rates: every pixel is the network that plain PyTorch trains alone."""

import pytest
import torch
import torch.nn.functional as F
from oracle import train_alone
from PIL import Image

from mbkit.figures import plots
from mbkit.lessons.trainability import WINDOW, RateGrid, Trainability, TwoLayers, film, points, spaced

X, Y = (tensor.double() for tensor in points()[0])


def alone(first, second, steps, cls=torch.optim.SGD, seed=3, **hyperparameters):
    """Losses [steps] of one network in plain PyTorch, with torch's own parameter groups."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TwoLayers().double()
    groups = [{"params": [model.first], "lr": first}, {"params": [model.second], "lr": second}]
    how = {"seeds": None, "optimizer_cls": lambda _: cls(groups, **hyperparameters), "configs": {}}
    return train_alone([model], [(X, Y)] * steps, loss_fn=F.mse_loss, **how)[:, 0].float()  # as the map keeps them


@pytest.mark.parametrize(
    ("cls", "hyperparameters"), [(torch.optim.SGD, {"momentum": 0.5}), (torch.optim.Adam, {"eps": 1e-3})]
)
def test_every_pixel_is_the_network_trained_alone_also_when_the_grid_is_used_again(cls, hyperparameters):
    grid = RateGrid(lambda: TwoLayers().double(), [(X, Y)], size=3, seed=3, optimizer_cls=cls, **hyperparameters)
    for window in ((0.01, 0.1), (0.02, 0.2)), ((0.03, 0.3), (0.01, 0.05)):
        *_, outcome = grid.train(*window, steps=25)
        assert outcome.loss.shape == (25, 3, 3)
        for row, second in enumerate(spaced(*window[1], 3).tolist()):
            for column, first in enumerate(spaced(*window[0], 3).tolist()):
                expected = alone(first, second, 25, cls, **hyperparameters)
                torch.testing.assert_close(
                    outcome.loss[:, row, column], expected, rtol=2e-7, atol=0
                )  # float32's last bit


def test_what_counts_as_diverged_and_as_trained():
    loss = torch.ones(2, 2, 3)
    loss[1] = torch.tensor([[0.4, 0.6, 1.2], [1.3, float("nan"), float("inf")]])
    outcome = Trainability(torch.ones(3), torch.ones(2), loss, 2)
    assert (outcome.ratio < 0.5).tolist() == [[True, False, False], [False, False, False]]
    assert outcome.diverged.tolist() == [[False, False, False], [True, True, True]]


def test_the_map_goes_from_slow_to_diverged_and_its_figure_leaves_out_what_diverged():
    state = torch.get_rng_state()
    *_, outcome = RateGrid(size=12).train(*WINDOW, steps=60)
    assert torch.equal(torch.get_rng_state(), state)
    assert not outcome.diverged[0].any()
    assert outcome.diverged[-1].all()
    assert (outcome.ratio < 0.5).any()
    image = plots.trainability(outcome, (1, 4)).axes[0].images[0].get_array()
    assert image.mask.tolist() == outcome.diverged.tolist()
    expected = outcome.ratio.double().clamp(min=1e-5).log10()[~outcome.diverged]
    torch.testing.assert_close(torch.from_numpy(image.data)[~outcome.diverged], expected)


@pytest.mark.parametrize("rates", [(0.0, 1.0), (1.0, 0.1), (1.0, float("inf"))])
def test_impossible_ranges_are_refused(rates):
    with pytest.raises(ValueError, match="lowest and the highest rate"):
        next(RateGrid(size=2).train(rates, rates, 1))


def test_a_film_shows_the_map_step_by_step(tmp_path):
    film(tmp_path / "film.gif", size=8, steps=16)
    with Image.open(tmp_path / "film.gif") as saved:
        assert saved.n_frames == 13  # the first dozen steps, and the last
        first = saved.convert("L").tobytes()
        saved.seek(12)
        assert saved.convert("L").tobytes() != first
