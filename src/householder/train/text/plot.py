"""The picture: loss by position beyond the training length, one curve a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from householder.train.plot import COLORS, FAINT, INK, name_curve, set_title, spread_apart, style
from householder.train.text.positions import binned, loss_at_end, loss_at_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_GROWTH = 1e-3  # in nats per token, that the picture shows


def losses_figure(
    losses: Mapping[str, np.ndarray[Any, Any]],
    context: int,
    published: Mapping[str, float] | None = None,
) -> Figure:
    """Draw the loss by position, and below it by how much it has grown, one curve a model.

    Both are means over half of the training length: over as long a part the evaluated text is the
    same everywhere.

    Args:
        losses: of at least one model, by its title: the mean loss in nats at every position; all of
            the same length.
        context: the training length.
        published: by title, how much the loss of other models with these mixers has grown at their
            end, in nats; drawn as circles.
    """
    from matplotlib.figure import Figure

    length = len(next(iter(losses.values())))
    size = max(1, context // 2)
    figure = Figure(figsize=(8.4, 7.2), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    curves = [binned(of_model, size) for of_model in losses.values()]
    starts = [loss_at_length(of_model, context) for of_model in losses.values()]
    ends = [loss_at_end(of_model) for of_model in losses.values()]
    middles = np.minimum(np.arange(len(curves[0])) * size + size / 2, length)
    for curve, start, color in zip(curves, starts, cycle((*COLORS, INK)), strict=False):
        above.plot(middles, curve, color=color, linewidth=2, zorder=3)
        # Less is no growth, and lies on the axis.
        grown = np.maximum(curve[2:] - start, LEAST_GROWTH)
        below.plot(middles[2:], grown, color=color, linewidth=2, zorder=3)
    _draw_published(below, list(losses), length, published or {})
    below.set_yscale("log")
    below.set_ylim(LEAST_GROWTH, max(below.get_ylim()[1], 10 * LEAST_GROWTH))
    for axes in (above, below):
        axes.axvspan(0, context, color="#f4f4f4", linewidth=0, zorder=0)
        axes.axvline(context, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        style(axes)
    _name_ends(above, ends, [f"{t}  ({end:.2f})" for t, end in zip(losses, ends, strict=True)])
    growths = [end - start for start, end in zip(starts, ends, strict=True)]
    _name_ends(
        below,
        [max(growth, LEAST_GROWTH) for growth in growths],
        [f"{title}  ({growth:+.3f})" for title, growth in zip(losses, growths, strict=True)],
    )
    above.set_xlim(0, length)
    below.xaxis.set_major_formatter("{x:,.0f}")
    below.set_xlabel("position (tokens)", color=INK)
    above.set_ylabel("loss (nats per token)", color=INK)
    below.set_ylabel("growth beyond the training length", color=INK)
    set_title(above, f"Held-out loss by position, trained on {context:,} tokens")
    return figure


def _draw_published(
    axes: Axes, titles: Sequence[str], place: int, published: Mapping[str, float]
) -> None:
    """Draw how much losses have grown elsewhere as circles, each in its curve's colour."""
    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": 8,
        "linestyle": "none",
        "markerfacecolor": "white",
    }
    for title, color in zip(titles, cycle((*COLORS, INK)), strict=False):
        if title in published:
            height = max(published[title], LEAST_GROWTH)
            axes.plot(
                place, height, markeredgecolor=color, markeredgewidth=2, clip_on=False, **ring
            )
    if published.keys() & set(titles):
        (key,) = axes.plot([], [], markeredgecolor=INK, markeredgewidth=1.5, **ring)
        axes.legend([key], ["published, other models and text"], frameon=False, loc="center left")


def _name_ends(axes: Axes, ends: Sequence[float], names: Sequence[str]) -> None:
    """Write the names beside the ends of their curves, moved apart where they would touch."""
    low, high = axes.get_ylim()
    scale = axes.transScale.transform
    (_, bottom), (_, top) = scale((1.0, low)), scale((1.0, high))
    heights = [(scale((1.0, end))[1] - bottom) / (top - bottom) for end in ends]
    places = spread_apart(heights, 0.085)
    for name, place, color in zip(names, places, cycle((*COLORS, INK)), strict=False):
        name_curve(axes, name, (1, place), color, xycoords="axes fraction")
