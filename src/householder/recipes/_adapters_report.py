"""The comparison of adapters as a table beside published means, and as a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from householder.recipes._adapters_records import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from householder.recipes._adapters_records import Outcome, Settings

# VTAB-1k and FGVC means of ViT-B/16 pretrained on ImageNet-21k, from the HTA paper's tables.
# LoRA's rank is not stated there: its means stand beside one of ours.
PUBLISHED: dict[tuple[str, int], tuple[float | None, float | None]] = {
    ("full", 0): (65.6, 88.5),
    ("hta", 0): (72.0, None),
    ("hta", 1): (74.7, 90.6),
    ("lora", 4): (72.3, 89.5),
}


def results_table(outcomes: Sequence[Outcome], settings: Settings) -> Table:
    """Return the measured table, with the published means of another data set beside it."""
    from rich.table import Table

    data = "scikit-learn's digits" if settings.images is None else settings.images
    table = Table(
        title=f"Adapting to the other half of the classes of {data}, {settings.shots} images each",
        title_justify="left",
        caption="Published: ViT-B/16 on VTAB-1k and FGVC, other data and another model.",
        caption_justify="left",
    )
    table.add_column("method")
    for heading in ("numbers", "accuracy", "±", "ms/step", "KiB/step", "VTAB-1k", "FGVC"):
        table.add_column(heading, justify="right")
    for o in outcomes:
        vtab, fgvc = _published(o.kind, o.size)
        table.add_row(
            o.variant.name,
            f"{o.num_parameters:,}",
            f"{o.mean:.1%}",
            f"{o.spread:.1%}",
            f"{1e3 * o.step_seconds:.1f}",
            f"{o.step_bytes / 1024:,.0f}",
            *("" if x is None else f"{x:.1f}" for x in (vtab, fgvc)),
        )
    return table


def _published(kind: str, size: int) -> tuple[float | None, float | None]:
    """Return the published means of a method, where its published size is this one's."""
    return PUBLISHED.get((kind, size), (None, None))


def plot(outcomes: Sequence[Outcome], settings: Settings) -> bytes:
    """Draw accuracy against numbers trained, one curve per method, as a PNG file."""
    buffer = io.BytesIO()
    figure = accuracy_figure(outcomes, settings)
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def accuracy_figure(outcomes: Sequence[Outcome], settings: Settings) -> Figure:
    """Draw what `plot` writes, as a matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from householder.train.plot import COLORS, FAINT, INK

    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(o.kind for o in outcomes))
    for kind, color in zip(kinds, COLORS, strict=False):
        mine = sorted((o for o in outcomes if o.kind == kind), key=lambda o: o.num_parameters)
        _draw_kind(axes, kind, mine, color)
    axes.set_xscale("log")
    axes.set_xlabel("numbers trained beside the new head", color=INK)
    axes.set_ylabel("accuracy on held-out images", color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, color=FAINT)
    if set(kinds) - {"probe"}:
        axes.legend(frameon=False, fontsize=9, loc="center right")
    data = "scikit-learn's digits" if settings.images is None else Path(settings.images).name
    axes.set_title(
        f"Adapting a small ViT to the other half of {data}",
        loc="left",
        fontsize=13,
        fontweight="bold",
        color=INK,
        pad=24,
    )
    axes.text(
        0,
        1.035,
        f"{settings.shots} images per class, {settings.steps} steps, mean and standard deviation "
        f"of {settings.seeds} seeds",
        transform=axes.transAxes,
        fontsize=9,
        color=FAINT,
    )
    return figure


def _draw_kind(axes: Axes, kind: str, outcomes: Sequence[Outcome], color: str) -> None:
    """Draw one method: a curve over its sizes, or a level if it trains the head alone."""
    ys = [o.mean for o in outcomes]
    if kind == "probe":
        axes.axhline(ys[0], color=color, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            NAMES[kind],
            (0.01, ys[0]),
            (0, -11),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=9,
            color=color,
        )
        return
    axes.errorbar(
        [max(1, o.num_parameters - o.head_parameters) for o in outcomes],
        ys,
        yerr=[o.spread for o in outcomes],
        color=color,
        marker="o",
        markersize=5,
        capsize=2,
        linewidth=1.8,
        elinewidth=0.8,
        label=NAMES[kind],
    )
