"""Word problems of groups: how many reflections per token one layer needs.

Published: i.i.d. uniform group elements after a BOS token, the running product as the label of
every position, training length 128, and as the metric the fraction of sequences whose whole prefix
is right, up to length 512.

References:
    DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (Siems,
    Carstensen, Zela, Hutter, Pontil, Grazzi, 2025), https://arxiv.org/abs/2502.10297
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from householder.recipes.sizes import of_size
from householder.train.config import TrainConfig
from householder.train.errors import ConfigError
from householder.train.loop import TrainResult
from householder.train.report import LEARNT

# Reflections per token with which one layer, β in (0, 2), fits length 128 and extrapolates.
PUBLISHED_REFLECTIONS = {"s3": 2, "s4": 2, "a5": 2, "s5": 4}

# Layers of single reflections that fit length 128; for S5 even ten do not.
PUBLISHED_LAYERS = {"s3": 3, "s4": 6, "a5": 3, "s5": 11}

# Where the published curves of one layer on S5 pass, read off the figure: length and accuracy by N.
PUBLISHED_S5 = {
    1: ((10, 0.0),),
    2: ((10, 0.0),),
    3: ((50, 0.0),),
    4: ((190, 1.0), (330, 0.5), (512, 0.0)),
}

# The scale of the published code's README: 100,000 words, d = 128, 8 heads of 32. Its optimizer
# (100 epochs in batches of 2048, learning rate 1e-3, weight decay 1e-6) learns S3 alone. What makes
# the larger groups learnable in as many minutes is ours: words that grow from 3 elements to 128,
# four times smaller batches, and weight decay, or they are learnt but not extrapolated.
_GPU: dict[str, Any] = {
    "length": 128,
    "start_length": 3,
    "growth_steps": 6000,
    "eval_length": 512,
    "num_samples": 100_000,
    "steps": 12_000,
    "batch_size": 512,
    "d_model": 128,
    "num_heads": 8,
    "head_dim": 32,
    "mlp_width": 512,
    "lr": 2e-3,
    "schedule": "cosine",
    "warmup": 100,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "eval_samples": 4096,
    "eval_interval": 1000,
    "log_interval": 100,
    "checkpoint_interval": 2000,
}

# The same question in minutes on two cores: fresh data every step, and shorter words for the larger
# groups, whose tables take longer to learn (S3 is the main job). Untold settings are the defaults.
# S5 is absent: at length 6 and d = 128, N = 4 had not learnt it after 5,000 steps of 128 sequences,
# ten minutes.
_CPU: dict[str, dict[str, Any]] = {
    "s3": {},
    "s4": {"length": 10, "batch_size": 64},
    "a5": {
        "length": 6,
        "batch_size": 128,
        "d_model": 128,
        "num_heads": 8,
        "lr": 1e-3,
        "steps": 3000,
    },
}


def settings(task: str, size: str) -> dict[str, Any]:
    """Return the settings of the experiment, for `householder.train.Comparison.from_settings`.

    Args:
        task: "s3", "s4", "a5" or "s5".
        size: "gpu" for the scale of the published code, "cpu" for minutes on two cores.

    Returns:
        Settings by name; `num_householder` lists the smallest published N that fails and the one
        that is enough.

    Raises:
        ConfigError: the experiment has no such task or size, or not both together.

    Examples:
        >>> settings("s5", "gpu")["num_householder"]
        [3, 4]
    """
    if task not in PUBLISHED_REFLECTIONS:
        known = ", ".join(PUBLISHED_REFLECTIONS)
        raise ConfigError(
            f"state-tracking: `task` must be one of {known}, got {task!r}; "
            "other tasks train with `householder train`"
        )
    gpu = dict.fromkeys(PUBLISHED_REFLECTIONS, _GPU)
    by_task = of_size("state-tracking", {"cpu": _CPU, "gpu": gpu}, size)
    if task not in by_task:
        raise ConfigError(
            f"state-tracking: `size` must be gpu for {task}, which no CPU learns in minutes; "
            f"use --size gpu, or choose your own settings with `householder train --task {task}`"
        )
    needed = PUBLISHED_REFLECTIONS[task]
    return {"task": task, "num_householder": [needed - 1, needed], **by_task[task]}


def published(config: TrainConfig) -> str:
    """Return what was published for a run's task, N and number of layers at training length 128.

    Examples:
        >>> published(TrainConfig(task="s3", num_householder=1))
        'fails'
        >>> published(TrainConfig(task="a5", num_householder=2))
        'solved'
    """
    task, num_layers = config.task, config.num_layers
    if task not in PUBLISHED_REFLECTIONS:
        return "not published"
    if not config.allow_neg_eigval:
        return "fails" if num_layers == 1 else "not published"
    if num_layers == 1:
        verdict = "solved" if config.num_householder >= PUBLISHED_REFLECTIONS[task] else "fails"
        points = PUBLISHED_S5.get(config.num_householder, ()) if task == "s5" else ()
        curve = ", ".join(f"≈{accuracy:.0%} at {length}" for length, accuracy in points)
        return f"{verdict}; {curve}" if curve else verdict
    if config.num_householder == 1:
        return "solved" if num_layers >= PUBLISHED_LAYERS[task] else "fails"
    return "not published"


def published_beside_measured(results: Sequence[TrainResult]) -> Table:
    """Return a table of what was published and what was measured.

    Args:
        results: runs of one comparison.
    """
    config = results[0].config
    table = Table(
        title=f"{config.task}: published (trained at length 128) beside measured "
        f"(trained at length {config.length})",
        title_justify="left",
    )
    table.add_column("N", justify="right")
    table.add_column("layers", justify="right")
    table.add_column("published")
    table.add_column("measured")
    table.add_column("agree")
    for result in results:
        expected, evaluation = published(result.config), result.evaluation
        learnt = evaluation.at(result.config.length) >= LEARNT
        measured = (
            f"{'solved' if learnt else 'fails'}; {evaluation.at(config.length):.1%} at "
            f"{config.length}, {evaluation.accuracy[-1]:.1%} at {evaluation.lengths[-1]}"
        )
        agree = "yes" if expected.startswith("solved") == learnt else "no"
        table.add_row(
            str(result.config.num_householder),
            str(result.config.num_layers),
            expected,
            measured,
            "" if expected == "not published" else agree,
        )
    return table
