"""Language models beyond the length they were trained at: the loss at every position.

Published, as figures: models trained on 4,096 tokens and read on to about 30,000. On CodeParrot's
source code the loss of DeltaNet grows from 3.03 to 3.37, that of DeltaProduct with N = 2 from 2.95
to 3.05 and with N = 3 from 2.95 to 2.97 (nats per token, read off). That of softmax attention with
rotary positions explodes; with PaTH, and with PaTH's forget gates (PaTH-FoX), it extrapolates.

Here: models of some 30 million parameters on the bytes of source code, by default the standard
library of the Python that runs. Files stand one behind the other in one stream, in training as in
the evaluation, whose sequences are longer than most files. Held-out text is closed to a circle, and
the evaluated sequences begin around it at distances of half the training length, so that the
last half of the training length and any half beyond it are measured on the same text.

<out>/config.toml        the settings
<out>/corpus/            the text as tokens
<out>/<run>/             one folder per model: as of `householder train --text`, and losses.npy, the
                         mean loss at every position
<out>/results.json       cost, and loss at the training length and at the end
<out>/losses.csv         loss by position, one column per model
<out>/losses.png         the same as curves

References:
    DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (Siems,
    Carstensen, Zela, Hutter, Pontil, Grazzi, 2025), https://arxiv.org/abs/2502.10297;
    PaTH Attention: Position Encoding via Accumulating Householder Transformations (Yang et al.,
    2025), https://arxiv.org/abs/2505.16381
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from householder.recipes.sizes import of_size
from householder.storage import write_atomically
from householder.train.errors import CheckpointError, ConfigError
from householder.train.interrupt import StopRequest
from householder.train.output_folder import OutputFolder
from householder.train.plot import to_png
from householder.train.progress import abbreviate
from householder.train.settings import check_names, differences, field_types, read_toml
from householder.train.text.comparison import SETTINGS, TextComparison, run_name, run_title
from householder.train.text.config import TextConfig
from householder.train.text.folder import make_corpus
from householder.train.text.observer import TextObserver
from householder.train.text.plot import losses_figure
from householder.train.text.positions import (
    EvaluationConfig,
    binned,
    held_out_tokens,
    loss_at_end,
    loss_at_length,
    losses_by_position,
)
from householder.train.text.processes import Processes
from householder.train.text.run import train_text

# Loss in nats per token of CodeParrot at 4,096 and about 30,000 tokens, read off the figure, by
# mixer and N.
PUBLISHED = {
    ("delta_net", 1): (3.03, 3.37),
    ("delta_product", 2): (2.95, 3.05),
    ("delta_product", 3): (2.95, 2.97),
}
# What is published about the others is on other text.
PUBLISHED_IN_WORDS = {
    "rotary_attention": "explodes",
    "path_attention": "extrapolates",
    "forgetting_path_attention": "extrapolates",
}

_GPU: dict[str, Any] = {
    "mixer": [
        *("delta_net", "delta_product", "gated_delta_net"),
        *("path_attention", "forgetting_path_attention", "rotary_attention"),
    ],
    "num_householder": [2, 3],
    "preset": "30m",
    "context": 2048,
    "validation": 0.1,
    "separate_documents": False,
    "steps": 1800,
    "batch_size": 16,
    "lr": 2e-3,
    "warmup": 100,
    "min_lr": 1e-4,
    "eval_interval": 0,
    "sample_tokens": 0,
    "dtype": "bfloat16",
    "compile": True,
    "cuda_graphs": True,
    "log_interval": 20,
    "checkpoint_interval": 1000,
    "keep_checkpoints": 1,
    "eval_length": 32_768,
    "eval_windows": 128,
}
# A quarter of a million parameters, a sixteenth of the lengths.
_CPU: dict[str, Any] = {
    **_GPU,
    "preset": "10m",
    "d_model": 64,
    "num_layers": 2,
    "head_dim": 32,
    "context": 256,
    "max_tokens": 4_000_000,
    "steps": 300,
    "batch_size": 16,
    "warmup": 30,
    "dtype": "float32",
    "compile": False,
    "log_interval": 10,
    "checkpoint_interval": 100,
    "eval_length": 2048,
    "eval_windows": 512,
}

HEADER = "# Written by householder: the settings of the models in this folder.\n"
RESULT_FILES = ("corpus", "results.json", "losses.csv", "losses.png")


def settings(size: str) -> dict[str, Any]:
    """Return the settings of the experiment, for `Extrapolation.from_settings`.

    Args:
        size: "gpu" for 30 million parameters and 2,048 tokens, "cpu" for minutes on two cores.

    Raises:
        ConfigError: the experiment has no such size.

    Examples:
        >>> settings("gpu")["context"], settings("gpu")["eval_length"]
        (2048, 32768)
    """
    return dict(of_size("length-extrapolation", {"cpu": _CPU, "gpu": _GPU}, size))


@dataclass(frozen=True)
class Extrapolation:
    """Settings of models that differ in their mixers, and of what is done with them.

    Attributes:
        models: the settings of each.
        evaluation: how the loss by position is measured.

    Examples:
        >>> both = Extrapolation.from_settings({**settings("cpu"), "mixer": ["delta", "rope"]})
        >>> [run_name(config) for config in both.models.configs]
        ['delta-net', 'rotary-attention']
    """

    models: TextComparison
    evaluation: EvaluationConfig

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Extrapolation:
        """Make it from settings by name.

        Args:
            settings: those of `TextComparison.from_settings`, and fields of `EvaluationConfig`.

        Raises:
            ConfigError: a setting is unknown or cannot be.
        """
        names = field_types(EvaluationConfig)
        check_names(settings, (*SETTINGS, *names), "settings")
        models = {name: value for name, value in settings.items() if name not in names}
        evaluation = {name: value for name, value in settings.items() if name in names}
        return cls(TextComparison.from_settings(models), EvaluationConfig(**evaluation))

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `from_settings` makes the same."""
        return {**self.models.settings(), **self.evaluation.to_dict()}


@dataclass(frozen=True)
class Extrapolated:
    """What was measured of one model.

    Attributes:
        config: its settings.
        losses: float32 `[eval_length]`, the mean loss in nats at every position; that at index t is
            of a token predicted from the t + 1 before it.
        num_parameters: how many numbers were trained.
        tokens: seen in training, repetitions included.
        seconds: time spent training.
    """

    config: TextConfig
    losses: np.ndarray[Any, Any]
    num_parameters: int
    tokens: int
    seconds: float

    @property
    def published(self) -> list[tuple[float, float]]:
        """The published losses at the training length and at the end, if they are known."""
        losses = PUBLISHED.get((self.config.pattern, self.config.num_householder or 1))
        return [] if losses is None else [losses]

    @property
    def at_training_length(self) -> float:
        """The mean loss over the last half of the training length."""
        return loss_at_length(self.losses, self.config.context)

    @property
    def at_end(self) -> float:
        """The mean loss over the last eighth of the evaluated sequences."""
        return loss_at_end(self.losses)


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the models that a folder holds.

    Raises:
        OutputError: the folder holds none.
        ConfigError: its config file is damaged.
    """
    names = field_types(EvaluationConfig)
    return read_toml(_output(folder).require_config(), (*SETTINGS, *names))


def _output(folder: Path) -> OutputFolder:
    def is_ours(path: Path) -> bool:
        stored = Extrapolation.from_settings(stored_settings(folder))
        return path.name in (*RESULT_FILES, *map(run_name, stored.models.configs))

    return OutputFolder(folder, HEADER, is_ours)


def _open_folder(
    extrapolation: Extrapolation, folder: Path, *, resume: bool, overwrite: bool
) -> None:
    output = _output(folder)

    def check_same() -> None:
        stored = Extrapolation.from_settings(stored_settings(folder))
        output.require_same(
            {
                **differences(stored.evaluation, extrapolation.evaluation),
                **stored.models.differences(extrapolation.models),
            }
        )

    settings = extrapolation.settings()
    output.open(settings, resume=resume, overwrite=overwrite, check_same=check_same)


def run(
    extrapolation: Extrapolation,
    folder: Path,
    processes: Processes,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observe: Callable[[TextConfig], AbstractContextManager[TextObserver]],
    stop: StopRequest | None = None,
) -> list[Extrapolated]:
    """Train every model, measure its loss by position and write the results.

    Args:
        extrapolation: what to run.
        folder: where to write; made when missing.
        processes: one.
        resume: continue what the folder holds; models that are done are not touched.
        overwrite: delete what the folder holds of an earlier run.
        observe: makes who is told of every step of a model.
        stop: looked at after every step.

    Raises:
        ConfigError: there is no text, or too little of it, or there are several processes.
        OutputError: the folder is occupied, cannot be written, or holds nothing to resume.
        RunError: as in `householder.train.text.run.train_text`.
    """
    if processes.several:
        raise ConfigError("length-extrapolation: runs in one process; start it without torchrun")
    stop = stop or StopRequest()
    _open_folder(extrapolation, folder, resume=resume, overwrite=overwrite)
    models = extrapolation.models
    if not (folder / "corpus").exists():
        source = {"text": list(models.text)}
        with observe(models.configs[0]) as observer:
            make_corpus(models.configs[0], source, folder / "corpus", observer)
    held_out = held_out_tokens(folder / "corpus", extrapolation.evaluation)
    found = []
    for config in models.configs:
        run_folder = folder / run_name(config)
        if not (run_folder / "losses.npy").exists():
            run_folder.mkdir(exist_ok=True)
            with observe(config) as observer:
                result = train_text(
                    config,
                    run_folder,
                    processes,
                    resume=resume,
                    observer=observer,
                    stop=stop,
                    corpus=folder / "corpus",
                )
            losses = losses_by_position(result, held_out, extrapolation.evaluation, stop)
            write_atomically(run_folder / "losses.npy", _npy_bytes(losses))
        found.append(read_run(config, run_folder))
        write_results(found, folder)
    return found


def read_run(config: TextConfig, folder: Path) -> Extrapolated:
    """Return what `run` has left of a model in its folder.

    Raises:
        CheckpointError: it is not whole.
    """
    try:
        summary = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        losses = np.load(folder / "losses.npy")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: must hold results.json and losses.npy: {error}; delete it"
        ) from error
    cost = {name: summary[name] for name in ("num_parameters", "tokens", "seconds")}
    return Extrapolated(config, losses, **cost)


def _npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_results(found: Sequence[Extrapolated], folder: Path) -> None:
    """Write `results.json`, `losses.csv` and `losses.png`.

    Args:
        found: of at least one model, all evaluated to the same length.
        folder: where to write.
    """
    summary = [
        {
            "name": run_name(run.config),
            "num_parameters": run.num_parameters,
            "tokens": run.tokens,
            "seconds": run.seconds,
            "loss_at_training_length": run.at_training_length,
            "loss_at_end": run.at_end,
            "config": run.config.to_dict(),
        }
        for run in found
    ]
    write_atomically(folder / "results.json", json.dumps(summary, indent=1) + "\n")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["first_position", "last_position", *(run_name(run.config) for run in found)])
    size = max(1, len(found[0].losses) // 256)
    columns = [binned(run.losses, size) for run in found]
    for i, values in enumerate(zip(*columns, strict=True)):
        last = min((i + 1) * size, len(found[0].losses))
        rows.writerow([i * size + 1, last, *(f"{value:.5f}" for value in values)])
    write_atomically(folder / "losses.csv", text.getvalue())
    losses = {run_title(run.config): run.losses for run in found}
    grown = {run_title(run.config): end - start for run in found for start, end in run.published}
    figure = losses_figure(losses, found[0].config.context, grown)
    write_atomically(folder / "losses.png", to_png(figure))


def published_beside_measured(found: Sequence[Extrapolated]) -> Table:
    """Return a table of what was published and what was measured.

    Args:
        found: of at least one model.
    """
    config, length = found[0].config, len(found[0].losses)
    table = Table(
        title="loss in nats per token: published (4,096 to about 30,000 tokens of CodeParrot) "
        f"beside measured ({config.context:,} to {length:,})",
        title_justify="left",
    )
    table.add_column("model")
    for heading in ("params", "published", "measured", "training"):
        table.add_column(heading, justify="right")
    for run in found:
        published = PUBLISHED_IN_WORDS.get(run.config.pattern, "not published")
        for start, end in run.published:
            published = f"{start} → {end} ({end - start:+.2f})"
        growth = run.at_end - run.at_training_length
        table.add_row(
            run_title(run.config),
            abbreviate(run.num_parameters),
            published,
            f"{run.at_training_length:.3f} → {run.at_end:.3f} ({growth:+.3f})",
            f"{run.seconds:.0f} s",
        )
    return table
