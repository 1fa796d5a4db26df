"""The word problem of A5: how many layers attention needs, with PaTH and with rotary positions.

Published as a figure only: the fewest layers with which the accuracy exceeds 90%, on words of the
generators (1 2 3), (1 2 4), (1 2 5) and their inverses. Here: uniform words of these after a BOS
token, the running product as the label of every position (the task `a5-cycles`), and as the
accuracy at length n the fraction of words whose first n products are all right. One model per mixer
and depth, trained on the longest words, answers for all lengths, since it is causal.

References:
    PaTH Attention: Position Encoding via Accumulating Householder Transformations (Yang et al.,
    2025), https://arxiv.org/abs/2505.16381;
    The Illusion of State in State-Space Models (Merrill, Petty, Sabharwal, 2024),
    https://arxiv.org/abs/2404.08819
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from householder.recipes.sizes import of_size
from householder.storage import write_atomically
from householder.train.config import MIXER_TITLES
from householder.train.loop import TrainResult
from householder.train.plot import COLORS, FAINT, INK, name_curve, set_title, style, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.9  # the published threshold

# Nothing about the training is published; words that grow are what makes A5 learnable here.
_GPU: dict[str, Any] = {
    "length": 16,
    "start_length": 2,
    "growth_steps": 1200,
    "eval_length": 32,
    "num_samples": 200_000,
    "d_model": 128,
    "num_heads": 4,
    "num_layers": [1, 2, 3, 4],
    "steps": 2500,
    "batch_size": 512,
    "lr": 2e-3,
    "warmup": 100,
    "weight_decay": 0.1,
    "eval_samples": 4096,
    "cuda_graphs": True,
    "log_interval": 100,
    "checkpoint_interval": 500,
}
# Words are far shorter than a chunk, and on a CPU a loop over their tokens is faster.
_CPU: dict[str, Any] = {
    **_GPU,
    "impl": "reference",
    "length": 5,
    "eval_length": 10,
    "num_samples": None,
    "num_layers": [1, 2],
    "steps": 1200,
    "growth_steps": 600,
    "batch_size": 128,
    "d_model": 64,
    "eval_samples": 1024,
    "log_interval": 20,
    "checkpoint_interval": 200,
}


def settings(size: str) -> dict[str, Any]:
    """Return the settings of the experiment, for `householder.train.Comparison.from_settings`.

    Args:
        size: "gpu" for words of 16 elements, "cpu" for short ones, minutes on two cores.

    Raises:
        ConfigError: the experiment has no such size.

    Examples:
        >>> settings("cpu")["mixer"]
        ['path_attention', 'rotary_attention']
    """
    chosen = of_size("a5-attention", {"cpu": _CPU, "gpu": _GPU}, size)
    return {"task": "a5-cycles", "mixer": ["path_attention", "rotary_attention"], **chosen}


def fewest_layers(results: Sequence[TrainResult]) -> dict[str, dict[int, int | None]]:
    """Return by mixer and length with how many layers the accuracy exceeds 90%.

    Args:
        results: runs of one comparison.

    Returns:
        For each mixer, for each length, the smallest depth that was run and is enough, or None.
    """
    found: dict[str, dict[int, int | None]] = {}
    for result in sorted(results, key=lambda r: r.config.num_layers):
        of_mixer = found.setdefault(result.config.mixer, {})
        evaluation = result.evaluation
        for length, accuracy in zip(evaluation.lengths, evaluation.accuracy, strict=True):
            if of_mixer.get(length) is None:
                of_mixer[length] = result.config.num_layers if accuracy > LEVEL else None
    # In the order in which the runs came.
    return {mixer: found[mixer] for mixer in dict.fromkeys(r.config.mixer for r in results)}


def write_layers(results: Sequence[TrainResult], folder: Path) -> None:
    """Write `layers.csv` and `layers.png`.

    Args:
        results: runs of one comparison.
        folder: where to write.
    """
    found = fewest_layers(results)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["length", *found])
    for length in next(iter(found.values())):
        rows.writerow([length, *(of_mixer[length] or "" for of_mixer in found.values())])
    write_atomically(folder / "layers.csv", text.getvalue())
    write_atomically(folder / "layers.png", to_png(layers_figure(results)))


def layers_figure(results: Sequence[TrainResult]) -> Figure:
    """Draw the fewest layers by length, one staircase per mixer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found, config = fewest_layers(results), results[0].config
    most = max(result.config.num_layers for result in results)
    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (mixer, of_mixer) in enumerate(found.items()):
        enough = {length: n for length, n in of_mixer.items() if n is not None}
        # Side by side where they coincide.
        heights = [n + 0.04 * i for n in enough.values()]
        axes.plot(list(enough), heights, color=COLORS[i], linewidth=2.4, drawstyle="steps-mid")
        end = (max(enough), heights[-1]) if enough else (1, most + 0.5)
        reach = f"to length {max(enough)}" if enough else f"at no length with {most}"
        name_curve(axes, f"{MIXER_TITLES[mixer]}, {reach}", end, COLORS[i], offset=6)
    axes.axvline(config.length, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, results[0].evaluation.lengths[-1])
    axes.set_ylim(0.5, most + 0.6)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("length of the word (elements)", color=INK)
    axes.set_ylabel("fewest layers above 90%", color=INK)
    set_title(axes, f"Words over A5, trained on {config.length} elements")
    style(axes)
    return figure


def layers_table(results: Sequence[TrainResult]) -> Table:
    """Return a table of the fewest layers by length.

    Args:
        results: runs of one comparison.
    """
    found, config = fewest_layers(results), results[0].config
    depths: Mapping[str, list[int]] = {
        mixer: [r.config.num_layers for r in results if r.config.mixer == mixer] for mixer in found
    }
    lengths = sorted({max(1, round(config.length * share)) for share in (0.25, 0.5, 0.75, 1)})
    table = Table(
        title="a5: fewest layers above 90% (whole words; published: a figure only)",
        title_justify="left",
    )
    table.add_column("mixer")
    for length in lengths:
        table.add_column(f"length {length}", justify="right")
    for mixer, of_mixer in found.items():
        cells = (of_mixer[length] or f"more than {max(depths[mixer])}" for length in lengths)
        table.add_row(MIXER_TITLES[mixer], *map(str, cells))
    return table
