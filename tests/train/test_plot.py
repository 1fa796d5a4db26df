import itertools

import pytest
from matplotlib.text import Text
from torch import nn

from householder.train import Evaluation, TrainResult
from householder.train.plot import accuracy_figure, plot_accuracy, wilson_interval


@pytest.fixture
def runs(tiny):
    def result(n, accuracy):
        config = tiny(num_householder=n)
        evaluation = Evaluation("prefix", tuple(range(1, 13)), tuple(accuracy), 100)
        return TrainResult(config, nn.Identity(), evaluation, 12, 34, 5.6)

    fails = [max(0.0, 1 - 0.2 * t) for t in range(12)]
    return [result(1, fails), result(2, [1.0] * 12), result(3, [1.0] * 12), result(4, [1.0] * 12)]


def curves(axes, results):
    """Return the drawn line of each result, found by its data."""
    for result in results:
        wanted = list(result.evaluation.accuracy)
        yield [line for line in axes.get_lines() if list(line.get_ydata()) == wanted]


def test_every_curve_and_the_training_length_are_drawn(runs):
    (axes,) = accuracy_figure(runs).axes
    for lines, result in zip(curves(axes, runs), runs, strict=True):
        line = lines[0]
        assert list(line.get_xdata()) == list(result.evaluation.lengths)
    marks = [line for line in axes.get_lines() if list(line.get_xdata()) == [6, 6]]
    assert len(marks) == 1
    words = " ".join(text.get_text() for text in axes.findobj(Text))
    for word in ("S3", "N = 1", "N = 2", "training length"):
        assert word in words


def test_curves_differ_in_colour(runs):
    (axes,) = accuracy_figure(runs).axes
    lines = axes.get_lines()
    colors = [next(x for x in lines if x.get_label() == r.config.name).get_color() for r in runs]
    assert len(set(colors)) == len(runs)


def test_names_of_curves_with_one_end_do_not_touch_nor_leave_the_picture(runs):
    (axes,) = accuracy_figure(runs).axes
    names = [text for text in axes.texts if text.get_text().startswith("N = ")]
    heights = sorted(text.xy[1] for text in names)
    assert len(heights) == len(runs)
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.07
    assert 0 <= heights[0] < heights[-1] <= 1


def test_the_same_results_give_the_same_picture(runs):
    png = plot_accuracy(runs)
    assert png.startswith(b"\x89PNG\r\n")
    assert len(png) > 10_000
    assert plot_accuracy(runs) == png
    assert plot_accuracy(runs[:1]) != png


def test_wilson_interval_contains_the_measurement():
    for num, accuracy in itertools.product((1, 10, 1000), (0.0, 0.3, 1.0)):
        low, high = wilson_interval(accuracy, num)
        assert 0 <= low <= accuracy <= high <= 1
        assert high - low > 0
    # The value for 8 of 10 in the textbooks: 0.490 to 0.943.
    assert wilson_interval(0.8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
