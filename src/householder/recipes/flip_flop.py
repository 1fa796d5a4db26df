"""Flip-flop language modelling: one layer of attention that remembers one bit.

Published: 512 tokens, trained on FFL(0.8), one layer with two heads, d = 64; errors over the reads
on 16,000 sequences of FFL(0.8), 160,000 of FFL(0.98) and 4,000 of FFL(0.1). How the models were
trained is not published.

References:
    PaTH Attention: Position Encoding via Accumulating Householder Transformations (Yang et al.,
    2025), https://arxiv.org/abs/2505.16381;
    Exposing Attention Glitches with Flip-Flop Language Modeling (Liu, Ash, Goel, Krishnamurthy,
    Zhang, 2023), https://arxiv.org/abs/2306.00946
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from householder.recipes.sizes import of_size
from householder.recipes.transitions import record_transitions, transitions_figure
from householder.storage import write_atomically
from householder.train.build import resolve_device
from householder.train.config import TrainConfig, run_titles
from householder.train.data import generator_for
from householder.train.evaluation import autocast, evaluation_mode
from householder.train.loop import TrainResult
from householder.train.plot import COLORS, FAINT, INK, name_curve, set_title, style, to_png
from householder.train.tasks import FlipFlop, make_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Per cent of the reads, by test.
PUBLISHED = {
    "path_attention": {"flip-flop": 0.0, "flip-flop-sparse": 0.0001, "flip-flop-dense": 0.0},
    "rotary_attention": {"flip-flop": 6.9, "flip-flop-sparse": 40.3, "flip-flop-dense": 0.01},
    "forgetting_attention": {"flip-flop": 8.3, "flip-flop-sparse": 36.3, "flip-flop-dense": 0.0},
}
TEST_TITLES = {
    "flip-flop": "as trained, FFL(.8)",
    "flip-flop-sparse": "sparse, FFL(.98)",
    "flip-flop-dense": "dense, FFL(.1)",
}

# Task and model are the published ones; the optimizer is ours.
_GPU: dict[str, Any] = {
    "length": 512,
    "eval_length": 2048,
    "num_samples": 192_000,
    "d_model": 64,
    "num_heads": 2,
    "num_layers": 1,
    "steps": 3_000,
    "batch_size": 64,
    "lr": 2e-3,
    "warmup": 100,
    "weight_decay": 0.1,
    "eval_samples": 1024,
    "log_interval": 100,
    "checkpoint_interval": 2000,
}
# The same model on a quarter of the length.
_CPU: dict[str, Any] = {
    **_GPU,
    "length": 128,
    "eval_length": 512,
    "num_samples": None,
    "steps": 600,
    "batch_size": 32,
    "warmup": 50,
    "eval_samples": 256,
    "log_interval": 20,
    "checkpoint_interval": 200,
}
_TEST_SAMPLES = {
    "gpu": {"flip-flop": 16_000, "flip-flop-sparse": 160_000, "flip-flop-dense": 4_000},
    "cpu": {"flip-flop": 1_000, "flip-flop-sparse": 10_000, "flip-flop-dense": 250},
}
DRAWN = 1000  # sequences drawn at once, whatever the device
TEST_TOKENS = {"cpu": 1 << 15, "cuda": 1 << 19}  # that a model reads at once


def settings(size: str) -> dict[str, Any]:
    """Return the settings of the experiment, for `householder.train.Comparison.from_settings`.

    Args:
        size: "gpu" for the published one, "cpu" for minutes on two cores.

    Raises:
        ConfigError: the experiment has no such size.

    Examples:
        >>> settings("gpu")["mixer"]
        ['path_attention', 'rotary_attention', 'forgetting_attention']
    """
    chosen = of_size("flip-flop", {"cpu": _CPU, "gpu": _GPU}, size)
    return {"task": "flip-flop", "mixer": list(PUBLISHED), **chosen}


@dataclass(frozen=True)
class ReadErrors:
    """Count the errors of one run in one test.

    Attributes:
        config: the run's settings.
        test: "flip-flop", "flip-flop-sparse" or "flip-flop-dense".
        reads: int64 `[L / 2]`, how many reads came n pairs after the last write.
        wrong: int64 `[L / 2]`, how many of them were answered wrongly.
    """

    config: TrainConfig
    test: str
    reads: Tensor
    wrong: Tensor

    @property
    def percent(self) -> float:
        """The published metric."""
        return 100 * self.wrong.sum().item() / self.reads.sum().item()


def measure(result: TrainResult, size: str) -> list[ReadErrors]:
    """Put a trained model to the three tests.

    Args:
        result: a run of the experiment.
        size: as in `settings`; decides how many sequences.
    """
    return [count_errors(result, test, num) for test, num in _TEST_SAMPLES[size].items()]


def count_errors(result: TrainResult, test: str, num: int) -> ReadErrors:
    """Count the errors of a trained model over all reads of `num` sequences.

    Args:
        result: a run of the experiment.
        test: name of the task to test on.
        num: how many sequences; they depend on the run's seed and the test alone.
    """
    config, model = result.config, result.model
    task, device = make_task(test), resolve_device(config.device)
    assert isinstance(task, FlipFlop)
    model.to(device)
    pairs = config.length // 2
    reads, wrong = torch.zeros(2, pairs, dtype=torch.int64)
    at_once = max(1, TEST_TOKENS[device.type] // config.length)
    with evaluation_mode(model), torch.inference_mode(), autocast(config, device):
        for first in range(0, num, DRAWN):
            generator = generator_for(config.seed, f"test/{test}/{config.length}", first)
            tokens, labels = task.sample(min(DRAWN, num - first), config.length, generator)
            parts = tokens.to(device).split(at_once)
            answers = torch.cat([model(part).argmax(dim=-1) for part in parts]).cpu()
            distance = pairs_since_write(tokens)
            asked = tokens[:, ::2] == task.read
            missed = asked & (answers[:, ::2] != labels[:, ::2])
            reads += distance[asked].bincount(minlength=pairs)
            wrong += distance[missed].bincount(minlength=pairs)
    return ReadErrors(config, test, reads, wrong)


def pairs_since_write(tokens: Tensor) -> Tensor:
    """Return how many pairs before each instruction of `tokens [B, L]` the last write was.

    Examples:
        >>> pairs_since_write(torch.tensor([[2, 0, 4, 1, 3, 0, 2, 1, 3, 1]]))
        tensor([[0, 1, 2, 0, 1]])
    """
    instructions = tokens[:, ::2]
    places = torch.arange(instructions.shape[1], device=tokens.device)
    writes = torch.where(instructions == FlipFlop.write, places, 0)
    return places - writes.cummax(dim=1).values


def write_errors(found: Sequence[ReadErrors], folder: Path) -> None:
    """Write `errors.csv`, `errors-by-distance.csv` and `errors.png`.

    Args:
        found: of all runs and tests.
        folder: where to write.
    """
    totals, distances = io.StringIO(), io.StringIO()
    rows = csv.writer(totals, lineterminator="\n")
    rows.writerow(["run", "test", "reads", "wrong", "error_percent", "published_percent"])
    rows_by_distance = csv.writer(distances, lineterminator="\n")
    rows_by_distance.writerow(["run", "test", "pairs_since_write", "reads", "wrong"])
    for errors in found:
        name, reads, wrong = errors.config.name, errors.reads, errors.wrong
        expected = PUBLISHED.get(errors.config.mixer, {}).get(errors.test, "")
        count = reads.sum().item(), wrong.sum().item()
        rows.writerow([name, errors.test, *count, f"{errors.percent:.6g}", expected])
        for n in reads.nonzero().flatten().tolist():
            rows_by_distance.writerow([name, errors.test, n, reads[n].item(), wrong[n].item()])
    write_atomically(folder / "errors.csv", totals.getvalue())
    write_atomically(folder / "errors-by-distance.csv", distances.getvalue())
    write_atomically(folder / "errors.png", to_png(errors_figure(found)))


def errors_figure(found: Sequence[ReadErrors]) -> Figure:
    """Draw the share of wrong reads by how long ago the bit was written, over all tests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    runs = list(dict.fromkeys(errors.config for errors in found))
    for title, config, color in zip(run_titles(runs), runs, COLORS, strict=False):
        of_run = [errors for errors in found if errors.config == config]
        reads, wrong = (
            sum((getattr(errors, name) for errors in of_run), start=torch.zeros(()))
            for name in ("reads", "wrong")
        )
        middles, shares = _by_octave(reads, wrong)
        axes.plot(
            middles, shares, color=color, linewidth=2.4, marker="o", markersize=4, clip_on=False
        )
        name_curve(axes, title, (middles[-1], shares[-1]), color)
    axes.axhline(50, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("guessing", (1, 50), (0, 3), textcoords="offset points", fontsize=9, color=FAINT)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(-1, 56)
    axes.set_xlabel("instructions since the bit was written", color=INK)
    axes.set_ylabel("wrong reads (%)", color=INK)
    set_title(axes, f"Flip-flop, {found[0].config.length} tokens: one layer, two heads")
    style(axes)
    return figure


def _by_octave(reads: Tensor, wrong: Tensor) -> tuple[list[float], list[float]]:
    """Return distances 1, 2, 3, 4, 5.7, 8, … and the per cent wrong of the reads about each."""
    middles, shares = [], []
    edges = sorted({round(2 ** (i / 2)) for i in range(2 * len(reads).bit_length())})
    for low, high in pairwise(edges):
        count = reads[low:high].sum().item()
        # Fewer reads would say nothing about an error of some per cent.
        if count >= 100:
            middles.append((low * (high - 1)) ** 0.5)
            shares.append(100 * wrong[low:high].sum().item() / count)
    return middles, shares


def transitions_picture(result: TrainResult, num_tokens: int = 48) -> bytes:
    """Draw what the first layer of a trained PaTH model does with a short held-out sequence.

    Args:
        result: a run with mixer "path_attention".
        num_tokens: how long the sequence is, even.

    Returns:
        A PNG file.
    """
    task, device = make_task("flip-flop"), resolve_device(result.config.device)
    assert isinstance(task, FlipFlop)
    generator = generator_for(result.config.seed, "picture", num_tokens)
    tokens = task.sample(1, num_tokens, generator).tokens[0]
    found = record_transitions(result.model.to(device), tokens.to(device))
    labels = [task.symbols[token] for token in tokens.tolist()]
    title = "PaTH, trained on flip-flop: attention and β on one sequence"
    return to_png(transitions_figure(found, labels, title))


def published_beside_measured(found: Sequence[ReadErrors]) -> Table:
    """Return a table of what was published and what was measured, in per cent of the reads.

    Args:
        found: of all runs and tests.
    """
    runs = list(dict.fromkeys(errors.config for errors in found))
    table = Table(
        title=f"wrong reads in per cent: published (512 tokens) / measured "
        f"({runs[0].length} tokens)",
        title_justify="left",
    )
    table.add_column("run")
    for title in TEST_TITLES.values():
        table.add_column(title, justify="right")
    for title, config in zip(run_titles(runs), runs, strict=True):
        cells = []
        for test in TEST_TITLES:
            (errors,) = (e for e in found if e.config == config and e.test == test)
            expected = PUBLISHED.get(config.mixer, {}).get(test)
            published = "not published" if expected is None else f"{expected:g}"
            cells.append(f"{published} / {errors.percent:.3g}")
        table.add_row(title, *cells)
    return table
