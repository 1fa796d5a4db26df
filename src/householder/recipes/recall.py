"""Multi-query associative recall: how wide a model must be to recall 64 values by their keys.

Published, as a figure: 512 tokens, 64 pairs, 8,192 tokens of vocabulary, two layers with two heads,
widths 64, 128 and 256; DeltaNet without convolutions answers about 100% of the queries at every
width. 100,000 sequences, 64 epochs in batches of 128, AdamW with weight decay 0.1, the best of four
learning rates from 1e-4 to 1e-2. The models have no MLPs, and their head is the embedding; with a
head of its own the values are learnt one by one before any of them can be copied.

One comparison per width, in the folders d64, d128, … of the output folder.

References:
    Zoology: Measuring and Improving Recall in Efficient Language Models (Arora, Eyuboglu,
    Timalsina, Johnson, Poli, Zou, Rudra, Ré, 2023), https://arxiv.org/abs/2312.04927;
    Parallelizing Linear Transformers with the Delta Rule over Sequence Length (Yang, Wang, Zhang,
    Shen, Kim, 2024), https://arxiv.org/abs/2406.06484
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from householder.recipes.sizes import of_size
from householder.storage import write_atomically
from householder.train.config import MIXER_TITLES, TrainConfig, takes_several
from householder.train.plot import COLORS, INK, name_curve, set_title, spread_apart, style, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Per cent of the queries by mixer at the published setting, read off a figure.
PUBLISHED = {"delta_net": 100}
PUBLISHED_TASK = "mqar-64"

# By width a rate that learns. The look-up is found after a plateau of some thousand steps. With
# 2.15e-3 (64) the plateau did not end, with 1e-3 (256) sequences were learnt by heart instead.
LEARNING_RATES = {"cpu": {32: 3e-3, 64: 3e-3}, "gpu": {64: 1e-3, 128: 1e-3, 256: 4.6e-4}}

# As published, but for a quarter of the steps, RMSNorm in place of LayerNorm, and no dropout: with
# 0.1 on the embeddings the plateau did not end.
_GPU: dict[str, Any] = {
    "task": PUBLISHED_TASK,
    "length": 512,
    "eval_length": 1024,
    "num_samples": 100_000,
    "mixer": [
        "delta_net",
        "delta_product",
        "gated_delta_net",
        "path_attention",
        "rotary_attention",
    ],
    "num_householder": [2],
    "num_layers": 2,
    "num_heads": 2,
    "allow_neg_eigval": False,
    "use_short_conv": False,
    "mlp_width": 0,
    "tie_embeddings": True,
    "steps": 12_000,
    "batch_size": 128,
    "warmup": 0,
    "weight_decay": 0.1,
    "eval_samples": 3000,
    "dtype": "bfloat16",
    "compile": True,
    "cuda_graphs": True,
    "log_interval": 100,
    "checkpoint_interval": 5000,
}
# Eight pairs of a small vocabulary, and convolutions, with which key and value are seen as one and
# recall is learnt in hundreds of steps. Attentions have none here, and need thousands.
_CPU: dict[str, Any] = {
    **_GPU,
    "task": "mqar-8-256",
    "mixer": ["delta_net", "delta_product", "gated_delta_net"],
    "length": 64,
    "eval_length": 128,
    "num_samples": None,
    "use_short_conv": True,
    "steps": 1000,
    "batch_size": 32,
    "warmup": 50,
    "eval_samples": 512,
    "dtype": "float32",
    "compile": False,
    "log_interval": 10,
    "checkpoint_interval": 100,
}


def widths(size: str) -> list[int]:
    """Return the widths of a size of the experiment, each a comparison of its own.

    Raises:
        ConfigError: the experiment has no such size.

    Examples:
        >>> widths("gpu")
        [64, 128, 256]
    """
    return list(of_size("recall", LEARNING_RATES, size))


def settings(size: str, d_model: int) -> dict[str, Any]:
    """Return the settings of one width, for `householder.train.Comparison.from_settings`.

    Args:
        size: "gpu" for the published task, "cpu" for minutes on two cores.
        d_model: the width; one that is not in `widths(size)` gets the learning rate of the nearest.

    Raises:
        ConfigError: the experiment has no such size.

    Examples:
        >>> chosen = settings("gpu", 128)
        >>> chosen["task"], chosen["d_model"], chosen["lr"]
        ('mqar-64', 128, 0.001)
    """
    shared = of_size("recall", {"cpu": _CPU, "gpu": _GPU}, size)
    rates = LEARNING_RATES[size]
    nearest = min(rates, key=lambda width: abs(width - d_model))
    return {**shared, "d_model": d_model, "lr": rates[nearest]}


@dataclass(frozen=True)
class Recalled:
    """What one run recalls.

    Attributes:
        config: its settings.
        accuracy: share of the queries answered, by length.
        num_parameters: how many numbers were trained.
        steps: optimizer steps done.
        seconds: time spent training.
    """

    config: TrainConfig
    accuracy: dict[int, float]
    num_parameters: int
    steps: int
    seconds: float

    @property
    def at_training_length(self) -> float:
        """The published metric."""
        return self.accuracy[self.config.length]

    @property
    def title(self) -> str:
        """What the publications call the mixer, with N where it has a choice."""
        number = f", N = {self.config.num_householder}" if takes_several(self.config.mixer) else ""
        return MIXER_TITLES[self.config.mixer] + number


def read_results(folder: Path) -> list[Recalled]:
    """Return what all comparisons of an output folder have measured, the narrowest first.

    Args:
        folder: holds d64, d128, ….
    """
    found = []
    for path in folder.glob("d*/results.json"):
        for run in json.loads(path.read_text(encoding="utf-8")):
            evaluation = run["evaluation"]
            accuracy = dict(zip(evaluation["lengths"], evaluation["accuracy"], strict=True))
            cost = {name: run[name] for name in ("num_parameters", "steps", "seconds")}
            found.append(Recalled(TrainConfig(**run["config"]), accuracy, **cost))
    return sorted(found, key=lambda run: run.config.d_model)


def write_recall(found: Sequence[Recalled], folder: Path) -> None:
    """Write `recall.csv` and `recall.png`.

    Args:
        found: of at least one run.
        folder: where to write.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    named = (
        *("task", "mixer", "num_householder", "d_model"),
        *("use_short_conv", "mlp_width", "tie_embeddings", "lr", "seed"),
    )
    rows.writerow([*named, "parameters", "steps", "seconds", "length", "accuracy"])
    for run in found:
        row = [getattr(run.config, name) for name in named]
        row += [run.num_parameters, run.steps, run.seconds]
        for length, accuracy in run.accuracy.items():
            rows.writerow([*row, length, f"{accuracy:.6g}"])
    write_atomically(folder / "recall.csv", text.getvalue())
    write_atomically(folder / "recall.png", to_png(recall_figure(found)))


def _by_mixer(found: Sequence[Recalled]) -> dict[str, dict[int, Recalled]]:
    mixers: dict[str, dict[int, Recalled]] = {}
    for run in found:
        mixers.setdefault(run.title, {})[run.config.d_model] = run
    return mixers


def recall_figure(found: Sequence[Recalled]) -> Figure:
    """Draw the share of answered queries by width, one curve per mixer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    config = found[0].config
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    curves = _by_mixer(found)
    ends = {title: next(iter(runs.values())).at_training_length for title, runs in curves.items()}
    colors = dict(zip(curves, cycle(COLORS), strict=False))
    heights_of_names = spread_apart(list(ends.values()), 0.07)
    # Named at their narrow end, where they differ most.
    for title, height in zip(curves, heights_of_names, strict=True):
        widths = sorted(curves[title])
        heights = [curves[title][width].at_training_length for width in widths]
        (line,) = axes.plot(widths, heights, color=colors[title], linewidth=2.4, clip_on=False)
        line.set(marker="o", markersize=5)
        name, end = f"{title}  ({ends[title]:.1%})", (widths[0], height)
        name_curve(axes, name, end, colors[title], offset=-10, ha="right")
    every_width = sorted({run.config.d_model for run in found})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(every_width))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(-0.02, 1.06)
    axes.yaxis.tick_right()
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_xlabel("width of the model", color=INK)
    set_title(
        axes,
        f"Queries answered: {config.length} tokens, {_pairs(config)} pairs, "
        f"{config.num_layers} layers",
    )
    style(axes)
    axes.tick_params(axis="y", length=0)
    return figure


def _pairs(config: TrainConfig) -> int:
    from householder.train.tasks import MultiQueryAssociativeRecall, make_task

    task = make_task(config.task)
    assert isinstance(task, MultiQueryAssociativeRecall)
    return task.num_pairs


def published_beside_measured(found: Sequence[Recalled]) -> Table:
    """Return a table of what was published and what was measured, in per cent of the queries.

    Args:
        found: of at least one run.
    """
    config = found[0].config
    table = Table(
        title="queries answered, in per cent: published (512 tokens, 64 pairs) / measured "
        f"({config.length} tokens, {_pairs(config)} pairs)",
        title_justify="left",
    )
    widths = sorted({run.config.d_model for run in found})
    table.add_column("mixer")
    for width in widths:
        table.add_column(f"d = {width}", justify="right")
    for title, runs in _by_mixer(found).items():
        cells = []
        for width in widths:
            if width not in runs:
                cells.append("")
                continue
            expected = PUBLISHED.get(runs[width].config.mixer)
            published = "not published" if expected is None else f"≈{expected}"
            cells.append(f"{published} / {100 * runs[width].at_training_length:.1f}")
        table.add_row(title, *cells)
    return table
