"""Figures show the numbers that they are given, and nothing else."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mbkit.benchmark.result import Timing
from mbkit.figures import curves, plots
from mbkit.lessons import consistency


@pytest.fixture(scope="module")
def dissection():
    return consistency.dissect("published")


def lines(axes):
    return {line.get_label(): torch.as_tensor(line.get_ydata(), dtype=torch.float64) for line in axes.lines}


def result(**changes):
    return SimpleNamespace(
        **{
            "num_models": 2,
            "learning_rates": [0.01, 0.1],
            "alone": Timing(0.008, 0.007, 0.009),
            "batched": Timing(0.004, 0.003, 0.006),
            "speedup": 2.0,
            "alone_accuracy": torch.tensor([0.5, 0.4]),
            "batched_accuracy": torch.tensor([0.5, 0.3]),
            "setup": {"model": "LeNet5", "dataset": "digits", "steps": 1000},
            **changes,
        }
    )


def test_accuracy_bars_are_the_outcomes_accuracies(dissection):
    (axes,) = plots.accuracy(dissection[0]).axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    expected = [dissection[0].accuracy_alone, dissection[0].accuracy_batched]
    assert heights == [pytest.approx((100 * values).tolist()) for values in expected]
    assert "9.3" in axes.get_title()
    assert axes.get_ylabel() == "accuracy (%)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01", "0.1"]


def test_combinations_mark_what_is_wrong_and_how_far_it_leads(dissection):
    causes, accuracies, parameters = plots.combinations(dissection).axes
    filled = [[tuple(color[:3]) != (1, 1, 1) for color in dots.get_facecolors()] for dots in causes.collections]
    assert [sum(row) for row in zip(*filled, strict=True)] == [len(outcome.faults) for outcome in dissection]
    widths = [bar.get_width() for bar in accuracies.containers[0]]
    assert widths == pytest.approx([100 * outcome.max_difference for outcome in dissection])
    ends = [outcome.parameter_difference[-1].max().item() for outcome in dissection]
    assert [bar.get_width() for bar in parameters.containers[0]] == pytest.approx(ends)


def test_differences_have_the_same_axis_for_all_with_a_place_for_zero_and_a_band_for_rounding():
    gap = torch.tensor([0.0, 1e-7, 1e-3, math.inf, math.nan])
    (axes,) = plots.differences({"a": gap}).axes
    drawn = lines(axes)["a"]
    assert drawn[0] == pytest.approx(axes.get_yticks()[0])
    assert next(label.get_text() for label in axes.get_yticklabels()) == "0"
    assert drawn[1:3].tolist() == pytest.approx([1e-7, 1e-3])
    assert drawn[3:].isnan().all()
    (zeros,) = plots.differences({"a": torch.zeros(5)}).axes
    assert zeros.get_ylim() == axes.get_ylim()
    (both,) = plots.differences({"a": gap, "b": gap.double()}).axes
    assert [text.get_text() for text in both.texts] == ["rounding"] * 2  # of each precision
    assert both.get_ylim()[0] < axes.get_ylim()[0]


def test_what_diverged_leaves_at_the_top_and_is_marked_there():
    loss = torch.tensor([[2.0, 2.0, 2.0], [1.5, 2.4, 9.0], [1.0, 1.0, math.nan]])
    left, right = plots.learning_rates(loss, [0.1, 1.0, 10.0]).axes
    (drawn,) = left.collections
    paths = [torch.tensor(path) for path in drawn.get_segments()]
    assert paths[0][:, 1].tolist() == [2.0, 1.5, 1.0]
    assert paths[2][:2, 1].tolist() == [2.0, 9.0]
    assert left.get_ylim()[1] == pytest.approx(2.5)
    (dots,) = right.collections
    assert dots.get_offsets()[:2, 1].tolist() == [1.0, 1.0]
    assert not dots.get_offsets()[2, 1] > 0
    (cross,) = [line for line in right.lines if line.get_label() == "diverged"]
    assert list(cross.get_xdata()) == [10.0]
    assert cross.get_ydata()[0] == right.get_ylim()[1]
    assert "1 of 3 models diverged" in left.texts[0].get_text()


def test_the_line_goes_through_the_medians_of_those_that_did_not_diverge():
    loss = torch.tensor([[2.0] * 6, [1.0, 1.2, 1.4, 1.6, 1.8, math.nan]])
    _, right = plots.learning_rates(loss, [0.1] * 4 + [1.0] * 2).axes
    assert lines(right)["median of the seeds"].tolist() == pytest.approx([1.3, 1.8])


def test_colors_follow_the_learning_rate_and_models_of_one_rate_share_theirs():
    chart = plots.LearningRates([0.1, 0.1, 1.0], 5)
    assert (chart.colors[0] == chart.colors[1]).all()
    assert (chart.colors[0] != chart.colors[2]).any()


def test_accuracy_takes_the_place_of_the_loss_at_the_right():
    loss = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, math.nan]])
    _, right = plots.learning_rates(loss, [0.1, 1.0, 10.0], accuracy=torch.tensor([0.2, 0.6, 0.1])).axes
    assert right.collections[0].get_offsets()[:2, 1].tolist() == pytest.approx([20, 60])
    assert lines(right)["diverged"].tolist() == pytest.approx([10])  # its accuracy is what a table says of it
    assert "test set (%)" in right.get_ylabel()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ([[2.0], [2.4]], False),  # noise around where it began
        ([[2.0], [2.6]], True),  # a quarter above
        ([[2.0], [math.nan]], True),
        ([[2.0], [math.inf]], True),
        ([[math.nan], [math.nan]], True),
    ],
)
def test_diverged(loss, expected):
    assert curves.diverged(torch.tensor(loss)).tolist() == [expected]


def test_one_model_that_is_lost_does_not_hide_another():
    assert curves.diverged(torch.tensor([[math.inf, 2.0], [math.nan, 1.0]])).tolist() == [True, False]


def test_smooth_is_the_mean_of_the_last_steps():
    loss = torch.rand(20, 3, dtype=torch.float64)
    expected = torch.stack([loss[max(0, t - 3) : t + 1].mean(0) for t in range(20)])
    torch.testing.assert_close(curves.smooth(loss, 4), expected, rtol=0, atol=1e-12)
    spike = torch.tensor([[1.0], [1e30], [1.0], [1.0]])
    assert curves.smooth(spike, 2)[-1].item() == pytest.approx(1.0)  # one spike does not spoil what follows


def test_benchmark_shows_times_in_milliseconds_and_accuracies_of_both():
    left, right = plots.benchmark(result()).axes
    assert [bars[0].get_width() for bars in left.containers if hasattr(bars[0], "get_width")] == pytest.approx([8, 4])
    assert "2.00 times" in left.get_title()
    assert "(ms)" in left.get_xlabel()
    drawn = lines(right)
    assert drawn["alone"].tolist() == pytest.approx([50, 40])
    assert drawn["in the batch"].tolist() == pytest.approx([50, 30])


def test_growth_shows_the_medians_and_its_labels_keep_apart():
    times = {100: 0.010, 110: 0.011, 300: 0.020}
    measured = {n: result(alone=Timing(t, t, t), batched=Timing(t / 2, t / 2, t / 2)) for n, t in times.items()}
    (axes,) = plots.scaling({"parameters": measured}).axes
    assert lines(axes)["alone"].tolist() == pytest.approx([10, 11, 20])
    assert lines(axes)["in the batch"].tolist() == pytest.approx([5, 5.5, 10])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "300"]


def test_a_picture_shows_itself_as_a_small_png_that_keeps_rare_colors():
    picture = plots.Picture(4, 2)
    picture.subplots().plot([0.5], [0.5], "x", color=plots.WRONG, markersize=6)
    picture.axes[0].imshow(torch.arange(1000.0).view(20, 50).numpy(), extent=(0, 1, 0, 1))  # 256 other colors
    data, size = picture._repr_png_()
    image = Image.open(io.BytesIO(data))
    assert image.mode == "P"
    assert image.size == (560, 280)
    assert size["width"] == 400
    assert (
        plots.accuracy(consistency.run("quick"))._repr_png_()[1]["alt"].endswith("accuracy (%) against learning rate")
    )
    assert len(data) < 20_000
    wanted = tuple(int(plots.WRONG[i : i + 2], 16) for i in (1, 3, 5))
    gaps = [sum(abs(a - b) for a, b in zip(wanted, c, strict=True)) for _, c in image.convert("RGB").getcolors()]
    assert min(gaps) < 10


def test_a_frame_paints_what_changed_over_the_same_background():
    chart = plots.LearningRates([0.1, 1.0], 10)
    loss = torch.linspace(2, 1, 10)[:, None].expand(-1, 2)
    frames = []
    for steps, marked in ((5, None), (10, None), (10, 1), (10, None)):
        chart.update(loss[:steps], marked)
        frames.append(chart.frame())
    assert len(set(frames)) == 3
    assert frames[1] == frames[3]
