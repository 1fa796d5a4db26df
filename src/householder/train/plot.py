"""The picture: accuracy against length, one curve per run."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from householder.nn import MIXERS
from householder.train.config import MIXER_TITLES, run_titles
from householder.train.evaluation import METRIC_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from householder.train.loop import TrainResult

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#222222", "#8a8a8a"


def plot_accuracy(results: Sequence[TrainResult]) -> bytes:
    """Draw accuracy by length for several runs of one task.

    The bands are 95% Wilson intervals over the evaluated sequences; the training length is marked.

    Args:
        results: at least one run; all of the same task and lengths.

    Returns:
        A PNG file.
    """
    return to_png(accuracy_figure(results))


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    # No date and no version inside: the same curves give the same file.
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def style(axes: Axes) -> None:
    """Give axes the look of every picture: lines across, no frame, dark labels."""
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=3, color=FAINT)


def set_title(axes: Axes, title: str, pad: float | None = None) -> None:
    """Write a picture's title above its left corner, `pad` points away."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=pad)


def name_curve(
    axes: Axes,
    name: str,
    end: tuple[float, float],
    color: Any,
    *,
    offset: float = 8,
    **options: Any,
) -> None:
    """Write a curve's name beside its end.

    Args:
        axes: with the curve.
        name: what to write.
        end: where, in the data's units unless `options` say otherwise.
        color: the curve's.
        offset: how far to the right of it, in points.
        options: further ones of `Axes.annotate`.
    """
    axes.annotate(
        name,
        end,
        (offset, 0),
        textcoords="offset points",
        va="center",
        fontsize=10,
        fontweight="bold",
        color=color,
        annotation_clip=False,
        **options,
    )


def accuracy_figure(results: Sequence[TrainResult]) -> Figure:
    """Draw what `plot_accuracy` writes, as a matplotlib figure (without pyplot's global state)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    config, metric = results[0].config, results[0].evaluation.metric
    longest = max(result.evaluation.lengths[-1] for result in results)
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, longest)
    axes.set_ylim(-0.02, 1.06)
    _mark_training_length(axes, config.length, longest)
    for result, color in zip(results, cycle(COLORS), strict=False):
        _draw_curve(axes, result, color)
    _name_curves(axes, results, longest)

    set_title(axes, _title(results), pad=24)
    axes.text(0, 1.035, _subtitle(results), transform=axes.transAxes, fontsize=9, color=FAINT)
    axes.set_xlabel("position (tokens)" if metric == "prefix" else "length (tokens)", color=INK)
    axes.set_ylabel(METRIC_NAMES[metric], color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ticks = _ticks(config.length, longest)
    axes.set_xticks(ticks, [_tick_label(tick, config.length) for tick in ticks])
    style(axes)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(axis="y", length=0)
    return figure


def _mark_training_length(axes: Axes, length: int, longest: int) -> None:
    left, _ = axes.get_xlim()
    axes.axvspan(left, length, color="#f4f4f4", linewidth=0, zorder=0)
    axes.axvline(length, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    # Along the line, where neither a solved nor a failed curve passes.
    axes.annotate(
        f"training length {length}",
        (length, 0.5),
        (5 if longest > length else -5, 0),
        textcoords="offset points",
        rotation=90,
        va="center",
        ha="left" if longest > length else "right",
        fontsize=9,
        color=FAINT,
    )


def _draw_curve(axes: Axes, result: TrainResult, color: str) -> None:
    evaluation = result.evaluation
    bands = [wilson_interval(a, evaluation.num_samples) for a in evaluation.accuracy]
    axes.plot(
        evaluation.lengths,
        evaluation.accuracy,
        color=color,
        linewidth=2.4,
        marker="" if evaluation.metric == "prefix" else "o",
        markersize=4,
        solid_capstyle="round",
        clip_on=False,
        zorder=3,
        label=result.config.name,
    )
    axes.fill_between(
        evaluation.lengths,
        [low for low, _ in bands],
        [high for _, high in bands],
        color=color,
        alpha=0.18,
        linewidth=0,
        zorder=2,
    )


def _name_curves(axes: Axes, results: Sequence[TrainResult], longest: int) -> None:
    """Write title and last accuracy at each curve's end, moved apart where they would touch."""
    titles = run_titles([result.config for result in results])
    ends = [result.evaluation.accuracy[-1] for result in results]
    heights = spread_apart(ends, 0.075)
    for result, title, end, height in zip(results, titles, ends, heights, strict=True):
        line = next(x for x in axes.get_lines() if x.get_label() == result.config.name)
        name_curve(axes, f"{title}  ({end:.1%})", (longest, height), line.get_color())


def _title(results: Sequence[TrainResult]) -> str:
    config, evaluation = results[0].config, results[0].evaluation
    if evaluation.metric == "prefix":
        what = f"Tracking the product of a word over {config.task.upper()}"
    else:
        what = config.task.replace("-", " ").capitalize()
    return f"{what}, trained on {config.length} tokens"


def _subtitle(results: Sequence[TrainResult]) -> str:
    config = results[0].config
    model = "one layer" if config.num_layers == 1 else f"{config.num_layers} layers"
    if len({result.config.num_layers for result in results}) > 1:
        model = "one to several layers"
    if all(result.config.mixer == config.mixer for result in results):
        model += f" of {MIXER_TITLES[config.mixer]}"
        if config.mixer in MIXERS:
            beta = "β ∈ (0, 2)" if config.allow_neg_eigval else "β ∈ (0, 1)"
            model += f" with N reflections per token, {beta}"
    return (
        f"{model}, d = {config.d_model}, {config.num_heads} heads; "
        f"{results[0].evaluation.num_samples:,} held-out sequences"
    )


def _tick_label(length: int, training_length: int) -> str:
    if length <= training_length:
        return str(length)
    return f"{length}\n{length // training_length}×"


def _ticks(length: int, longest: int) -> list[int]:
    """Return multiples of the training length, about eight of them at most."""
    stride = length * max(1, round(longest / length / 8))
    return list(range(0, longest + 1, stride))


def wilson_interval(accuracy: float, num_samples: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    Args:
        accuracy: the measured proportion.
        num_samples: out of how many.
        z: quantile of the normal distribution; 1.96 for 95%.

    Returns:
        Lower and upper bound.

    Examples:
        >>> [round(bound, 4) for bound in wilson_interval(1.0, 1024)]
        [0.9963, 1.0]
    """
    shrink = 1 + z**2 / num_samples
    middle = (accuracy + z**2 / (2 * num_samples)) / shrink
    spread = accuracy * (1 - accuracy) / num_samples + z**2 / (4 * num_samples**2)
    half = z * math.sqrt(spread) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def spread_apart(heights: Sequence[float], distance: float) -> list[float]:
    """Return heights from 0 to 1, moved until neighbours are a distance apart.

    Args:
        heights: of names beside curves.
        distance: as much as keeps two names from touching.

    Examples:
        >>> [round(height, 2) for height in spread_apart([1.0, 0.5, 0.99, 0.5], 0.1)]
        [1.0, 0.6, 0.9, 0.5]
    """
    order = sorted(range(len(heights)), key=lambda i: (heights[i], -i))
    moved, lowest = list(heights), -distance
    for i in order:
        moved[i] = lowest = max(heights[i], lowest + distance)
    highest = 1 + distance
    for i in reversed(order):
        moved[i] = highest = min(moved[i], highest - distance)
    return moved
