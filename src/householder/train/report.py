"""What a comparison says in words and numbers: before it starts and when it is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from householder.nn import MIXERS
from householder.train.build import cpu_threads, resolve_device
from householder.train.comparison import Comparison
from householder.train.config import run_titles
from householder.train.evaluation import METRIC_NAMES
from householder.train.loop import TrainResult

# The accuracy at the training length from which a run counts as having learnt the task.
LEARNT = 0.99


def describe(comparison: Comparison) -> str:
    """Return a line that says what will be trained, on what, where."""
    config = comparison.shared
    layers = "1 layer" if config.num_layers == 1 else f"{config.num_layers} layers"
    beta = "β in (0, 2)" if config.allow_neg_eigval else "β in (0, 1)"
    mixers = {c.mixer for c in comparison.configs}
    model = f"{layers} of {config.mixer}" if len(mixers) == 1 else layers
    model += f", {beta}" if mixers & set(MIXERS) else ""
    device = resolve_device(config.device)
    threads = cpu_threads(config)
    where = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return (
        f"[bold]{config.task}[/bold], length {config.length}: "
        f"{'; '.join(run_titles(comparison.configs))}: {model}, d = {config.d_model}, "
        f"{config.num_heads} heads; "
        f"{config.steps} steps of {config.batch_size} sequences; {where}"
    )


def results_table(results: Sequence[TrainResult]) -> Table:
    """Return a table of the runs: cost, and accuracy at the training length and its multiples.

    Args:
        results: runs of one comparison.
    """
    config, evaluation = results[0].config, results[0].evaluation
    lengths = [config.length]
    while 2 * lengths[-1] <= evaluation.lengths[-1]:
        lengths.append(2 * lengths[-1])
    if lengths[-1] != evaluation.lengths[-1]:
        lengths.append(evaluation.lengths[-1])
    table = Table(title=f"{config.task}: {METRIC_NAMES[evaluation.metric]}", title_justify="left")
    table.add_column("run")
    for heading in ("params", "steps", "time"):
        table.add_column(heading, justify="right")
    for length in lengths:
        times = length / config.length
        heading = f"at {length}" if times == 1 else f"at {length} ({times:.3g}×)"
        table.add_column(heading, justify="right")
    table.add_column("95% up to", justify="right")
    for title, result in zip(run_titles([r.config for r in results]), results, strict=True):
        found = result.evaluation
        table.add_row(
            title,
            f"{result.num_parameters:,}",
            str(result.steps),
            f"{result.seconds:.1f} s",
            *(f"{found.at(length):.1%}" for length in lengths),
            str(found.reach(0.95)),
        )
    return table


def verdict(results: Sequence[TrainResult]) -> str:
    """Return a sentence that says which runs learnt the task, from what was measured.

    Args:
        results: runs of one comparison.
    """
    parts = []
    for title, result in zip(run_titles([r.config for r in results]), results, strict=True):
        evaluation, config = result.evaluation, result.config
        here, end = evaluation.at(config.length), evaluation.accuracy[-1]
        learnt = here >= LEARNT
        part = f"{title} {'learns' if learnt else 'does not learn'} "
        part += f"{config.task} ({here:.1%} at length {config.length}"
        if learnt and evaluation.lengths[-1] > config.length:
            part += f", {end:.1%} at {evaluation.lengths[-1]}"
        parts.append(part + ")")
    return "; ".join(parts) + "."
