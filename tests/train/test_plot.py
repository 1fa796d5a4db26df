import itertools

import pytest
from matplotlib.text import Text
from torch import nn

from householder.train import Evaluation, TrainResult
from householder.train.plot import accuracy_figure, plot_accuracy, wilson_interval


@pytest.fixture
def pair(tiny):
    def result(n, accuracy):
        config = tiny(num_householder=n)
        evaluation = Evaluation("prefix", tuple(range(1, 13)), tuple(accuracy), 100)
        return TrainResult(config, nn.Identity(), evaluation, 12, 34, 5.6)

    fails = [max(0.0, 1 - 0.2 * t) for t in range(12)]
    return [result(1, fails), result(2, [1.0] * 12)]


def curves(axes, results):
    """Return the drawn line of each result, found by its data."""
    for result in results:
        wanted = list(result.evaluation.accuracy)
        yield [line for line in axes.get_lines() if list(line.get_ydata()) == wanted]


def test_both_curves_and_the_training_length_are_drawn(pair):
    (axes,) = accuracy_figure(pair).axes
    for lines, result in zip(curves(axes, pair), pair, strict=True):
        (line,) = lines
        assert list(line.get_xdata()) == list(result.evaluation.lengths)
    marks = [line for line in axes.get_lines() if list(line.get_xdata()) == [6, 6]]
    assert len(marks) == 1
    words = " ".join(text.get_text() for text in axes.findobj(Text))
    for word in ("S3", "N = 1", "N = 2", "training length"):
        assert word in words


def test_curves_differ_in_colour(pair):
    (axes,) = accuracy_figure(pair).axes
    (one,), (two,) = curves(axes, pair)
    assert one.get_color() != two.get_color()


def test_the_same_results_give_the_same_picture(pair):
    png = plot_accuracy(pair)
    assert png.startswith(b"\x89PNG\r\n")
    assert len(png) > 10_000
    assert plot_accuracy(pair) == png
    assert plot_accuracy(pair[:1]) != png


def test_wilson_interval_contains_the_measurement():
    for num, accuracy in itertools.product((1, 10, 1000), (0.0, 0.3, 1.0)):
        low, high = wilson_interval(accuracy, num)
        assert 0 <= low <= accuracy <= high <= 1
        assert high - low > 0
    # The value for 8 of 10 in the textbooks: 0.490 to 0.943.
    assert wilson_interval(0.8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
