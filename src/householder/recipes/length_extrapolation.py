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
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table

from householder.models.causal_lm_config import ALIASES
from householder.nn import ATTENTIONS, MIXERS
from householder.storage import write_atomically
from householder.train.config import MIXER_TITLES, takes_several
from householder.train.errors import CheckpointError, ConfigError, Interrupted, OutputError
from householder.train.interrupt import StopRequest
from householder.train.plot import COLORS, FAINT, INK, spread_apart, to_png
from householder.train.progress import abbreviate
from householder.train.settings import (
    Settings,
    check_names,
    describe_differences,
    differences,
    field_types,
    read_toml,
    setting,
    to_toml,
)
from householder.train.text.config import TextConfig
from householder.train.text.corpus import documents, open_corpus, text_files, write_corpus
from householder.train.text.evaluation import circular_windows, token_losses
from householder.train.text.observer import TextObserver
from householder.train.text.processes import Processes
from householder.train.text.run import TextResult, not_compiled, train_text
from householder.train.text.tokenizer import make_tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

SIZES = ("cpu", "gpu")

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
    "log_interval": 10,
    "checkpoint_interval": 100,
    "eval_length": 2048,
    "eval_windows": 512,
}

LEAST_GROWTH = 1e-3  # in nats per token, that the picture shows

CONFIG_FILE = "config.toml"
HEADER = "# Written by householder: the settings of the models in this folder.\n"
RESULT_FILES = ("corpus", "results.json", "losses.csv", "losses.png")


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """How the loss by position is measured."""

    eval_length: int = setting(
        32_768, "Evaluate on sequences of so many tokens.", section="Evaluation", at_least=2
    )
    eval_windows: int = setting(
        128,
        "How many of them, half a context apart.",
        section="Evaluation",
        at_least=1,
    )


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
    if size not in SIZES:
        raise ConfigError(f"length-extrapolation: `size` must be one of cpu, gpu, got {size!r}")
    return dict(_GPU if size == "gpu" else _CPU)


@dataclass(frozen=True)
class Extrapolation:
    """Settings of models that differ in their mixers, and of what is done with them.

    Attributes:
        configs: of each model.
        evaluation: how the loss by position is measured.
        text: files and folders of text; none for Python's standard library.

    Examples:
        >>> both = Extrapolation.from_settings({**settings("cpu"), "mixer": ["delta", "rope"]})
        >>> [run_name(config) for config in both.configs]
        ['delta-net', 'rotary-attention']
    """

    configs: tuple[TextConfig, ...]
    evaluation: EvaluationConfig
    text: tuple[str, ...] = ()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Extrapolation:
        """Make it from settings by name.

        Args:
            settings: fields of `TextConfig` but `pattern`, and of `EvaluationConfig`; `mixer`, the
                mixers by any of their names; `num_householder`, a list for those that take several
                reflections per token; `text`.

        Raises:
            ConfigError: a setting is unknown or cannot be.
        """
        shared = dict(settings)
        known = (*field_types(TextConfig), *field_types(EvaluationConfig), "mixer", "text")
        check_names(shared, [name for name in known if name != "pattern"], "settings")
        mixers = [ALIASES.get(name, name) for name in shared.pop("mixer")]
        numbers = shared.pop("num_householder")
        for mixer in mixers:
            if mixer not in (*MIXERS, *ATTENTIONS):
                raise ConfigError(
                    f"`mixer` must be one of {', '.join((*MIXERS, *ATTENTIONS))}, got {mixer!r}"
                )
        text = tuple(shared.pop("text", ()))
        names = field_types(EvaluationConfig)
        evaluation = EvaluationConfig(**{n: shared.pop(n) for n in names if n in shared})
        runs = [
            (mixer, number)
            for mixer in mixers
            for number in (numbers if takes_several(mixer) else [1])
        ]
        if not runs or len(set(runs)) != len(runs):
            raise ConfigError(
                f"`mixer` and `num_householder` must list different ones, got {mixers}, {numbers}"
            )
        configs = [TextConfig(pattern=m, num_householder=n, **shared) for m, n in runs]
        return cls(tuple(configs), evaluation, text)

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `from_settings` makes the same."""
        shared = self.configs[0].to_dict()
        del shared["pattern"]
        numbers = [c.num_householder for c in self.configs if takes_several(c.pattern)] or [1]
        return {
            "mixer": list(dict.fromkeys(config.pattern for config in self.configs)),
            **shared,
            "num_householder": list(dict.fromkeys(numbers)),
            **self.evaluation.to_dict(),
            **({"text": list(self.text)} if self.text else {}),
        }


def run_name(config: TextConfig) -> str:
    """Return the name of a model's folder: `delta-net`, `delta-product-N2`."""
    number = f"-N{config.num_householder}" if takes_several(config.pattern) else ""
    return config.pattern.replace("_", "-") + number


def run_title(config: TextConfig) -> str:
    """Return what the publications call a model: `DeltaProduct, N = 2`."""
    number = f", N = {config.num_householder}" if takes_several(config.pattern) else ""
    return MIXER_TITLES[config.pattern] + number


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
    def at_training_length(self) -> float:
        """The mean loss over the last half of the training length."""
        context = self.config.context
        return float(self.losses[context // 2 : context].mean())

    @property
    def at_end(self) -> float:
        """The mean loss over the last eighth of the evaluated sequences."""
        return float(self.losses[-(len(self.losses) // 8 or 1) :].mean())


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the models that a folder holds.

    Raises:
        OutputError: the folder holds none.
        ConfigError: its config file is damaged.
    """
    path = folder / CONFIG_FILE
    if not _is_ours(path):
        raise OutputError(
            f"{folder}: nothing to resume, there is no {CONFIG_FILE} of this experiment; start "
            "without --resume"
        )
    known = [*field_types(TextConfig), *field_types(EvaluationConfig), "mixer", "text"]
    return read_toml(path, known)


def _is_ours(path: Path) -> bool:
    return path.is_file() and path.read_bytes().startswith(HEADER.encode())


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
    if not (folder / "corpus").exists():
        with observe(extrapolation.configs[0]) as observer:
            _make_corpus(extrapolation, folder / "corpus", observer)
    held_out = _held_out(extrapolation, folder / "corpus")
    found = []
    for config in extrapolation.configs:
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


def losses_by_position(
    result: TextResult, held_out: Any, evaluation: EvaluationConfig, stop: StopRequest
) -> np.ndarray[Any, Any]:
    """Return the mean loss of a trained model at every position, float32 `[eval_length]`.

    Args:
        result: of the training.
        held_out: tokens that it has not seen.
        evaluation: how long the sequences are and how many.
        stop: looked at between sequences.
    """

    def check() -> None:
        if stop.signum is not None:
            raise Interrupted(
                f"{stop.name} in the evaluation; the model is saved; continue with --resume",
                stop.signum,
            )

    device, config = result.model.head_weight.device, result.config
    windows = evaluation_windows(held_out, config.context, evaluation)
    enabled = config.dtype == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled), not_compiled():
        losses = token_losses(result.model, windows, check=check)
    return losses.double().mean(dim=0).float().numpy()


def evaluation_windows(
    held_out: Any, context: int, evaluation: EvaluationConfig
) -> np.ndarray[Any, Any]:
    """Return the sequences to evaluate, `[eval_windows, eval_length + 1]`.

    They begin half a context apart around a circle of the first held-out tokens. The circle is no
    longer than the text and no shorter than a sequence, which must not meet itself; the distance is
    then what comes of it.

    Args:
        held_out: tokens, more than eval_length.
        context: the training length.
        evaluation: how long the sequences are and how many.
    """
    wanted = evaluation.eval_windows * (context // 2)
    circle = max(evaluation.eval_length + 1, min(len(held_out), wanted))
    return circular_windows(held_out[:circle], evaluation.eval_length, evaluation.eval_windows)


def _npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def standard_library() -> list[Path]:
    """Return the sources of the running Python's standard library, its tests too if they are there.

    Installed packages, which may be in a folder of it, are left out.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(path for path in folder.rglob("*.py") if not others & set(path.parts))


def _make_corpus(extrapolation: Extrapolation, folder: Path, observer: TextObserver) -> None:
    text, config = extrapolation.text, extrapolation.configs[0]
    files = text_files([Path(name) for name in text]) if text else standard_library()
    write_corpus(
        documents(files, lambda file: observer.skipped(str(file))),
        folder,
        make_tokenizer(config.tokenizer),
        validation=config.validation,
        source={"text": list(text)},
        progress=observer.tokenizing,
        max_tokens=config.max_tokens,
    )


def _held_out(extrapolation: Extrapolation, corpus: Path) -> Any:
    """Return the held-out tokens.

    Raises:
        ConfigError: they are fewer than a sequence needs.
    """
    tokens = open_corpus(corpus).validation
    needed = extrapolation.evaluation.eval_length + 1
    if len(tokens) < needed:
        raise ConfigError(
            f"`eval_length` needs {needed} held-out tokens, there are {len(tokens)}; give more "
            "text, a larger --validation or a smaller --eval-length"
        )
    return tokens


def _open_folder(
    extrapolation: Extrapolation, folder: Path, *, resume: bool, overwrite: bool
) -> None:
    if resume and overwrite:
        raise ConfigError("`resume` continues and `overwrite` deletes the same folder; give one")
    try:
        # Names with a leading dot are what a kill leaves of a file being written.
        occupied = folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir())
        if resume:
            _check_same(extrapolation, Extrapolation.from_settings(stored_settings(folder)), folder)
        elif occupied and not overwrite:
            raise OutputError(
                f"{folder}: the output folder is occupied; continue with --resume, replace it with "
                "--overwrite, or choose another with --out"
            )
        elif occupied:
            _delete(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = to_toml(extrapolation.settings())
        write_atomically(folder / CONFIG_FILE, HEADER + content)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot write the output folder: {error.strerror}; choose another with --out"
        ) from error


def _check_same(requested: Extrapolation, stored: Extrapolation, folder: Path) -> None:
    different: dict[str, tuple[Any, Any]] = {
        **differences(stored.evaluation, requested.evaluation),
        **differences(stored.configs[0], requested.configs[0]),
    }
    names = [[run_name(config) for config in each.configs] for each in (stored, requested)]
    if names[0] != names[1]:
        different["mixer"] = names[0], names[1]
    if stored.text != requested.text:
        different["text"] = stored.text, requested.text
    if different:
        raise CheckpointError(
            f"{folder}: what it holds does not fit the requested settings: "
            f"{describe_differences(different)}; drop these settings or use another folder"
        )


def _delete(folder: Path) -> None:
    """Delete what `run` wrote; touch nothing when there is anything else."""
    if not _is_ours(folder / CONFIG_FILE):
        raise OutputError(
            f"{folder}: nothing is deleted, because no {CONFIG_FILE} says that householder wrote "
            "this folder; choose another with --out"
        )
    stored = Extrapolation.from_settings(stored_settings(folder))
    ours = {*RESULT_FILES, CONFIG_FILE, *(run_name(config) for config in stored.configs)}
    foreign = sorted(p.name for p in folder.iterdir() if p.name[0] != "." and p.name not in ours)
    if foreign:
        raise OutputError(
            f"{folder}: nothing is deleted, because {', '.join(foreign)} is not householder's; "
            "move it away or choose another folder with --out"
        )
    # The config file last: what a kill leaves half deleted can be overwritten again.
    for name in [*sorted(ours - {CONFIG_FILE}), CONFIG_FILE]:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
    write_atomically(folder / "losses.png", to_png(losses_figure(found)))


def binned(losses: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Return the means over `size` positions after `size` positions; the last bin may be smaller.

    Examples:
        >>> binned(np.arange(5.0), 2).tolist()
        [0.5, 2.5, 4.0]
    """
    starts = np.arange(0, len(losses), size)
    counts = np.diff(np.append(starts, len(losses)))
    return np.add.reduceat(losses.astype(np.float64), starts) / counts


def losses_figure(found: Sequence[Extrapolated]) -> Figure:
    """Draw the loss by position, and below it by how much it has grown, one curve a model.

    Both are means over half of the training length: over as long a part the evaluated text is the
    same everywhere.
    """
    from matplotlib.figure import Figure

    config, length = found[0].config, len(found[0].losses)
    size = max(1, config.context // 2)
    figure = Figure(figsize=(8.4, 7.2), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    curves = [binned(run.losses, size) for run in found]
    middles = np.minimum(np.arange(len(curves[0])) * size + size / 2, length)
    for run, curve, color in zip(found, curves, cycle((*COLORS, INK)), strict=False):
        above.plot(middles, curve, color=color, linewidth=2, zorder=3)
        # Less is no growth, and lies on the axis.
        grown = np.maximum(curve[2:] - run.at_training_length, LEAST_GROWTH)
        below.plot(middles[2:], grown, color=color, linewidth=2, zorder=3)
    below.set_yscale("log")
    below.set_ylim(LEAST_GROWTH, max(below.get_ylim()[1], 10 * LEAST_GROWTH))
    for axes in (above, below):
        axes.axvspan(0, config.context, color="#f4f4f4", linewidth=0, zorder=0)
        axes.axvline(config.context, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9, length=3, color=FAINT)
    _name_ends(above, found, [(run.at_end, f"{run.at_end:.2f}") for run in found])
    grown_at_end = [run.at_end - run.at_training_length for run in found]
    _name_ends(below, found, [(max(x, LEAST_GROWTH), f"{x:+.3f}") for x in grown_at_end])
    above.set_xlim(0, length)
    below.xaxis.set_major_formatter("{x:,.0f}")
    below.set_xlabel("position (tokens)", color=INK)
    above.set_ylabel("loss (nats per token)", color=INK)
    below.set_ylabel("growth beyond the training length", color=INK)
    above.set_title(
        f"Held-out loss by position, trained on {config.context:,} tokens",
        loc="left",
        fontsize=13,
        fontweight="bold",
        color=INK,
    )
    return figure


def _name_ends(
    axes: Axes, found: Sequence[Extrapolated], ends: Sequence[tuple[float, str]]
) -> None:
    """Write the models' titles and numbers beside the ends of their curves."""
    low, high = axes.get_ylim()
    scale = axes.transScale.transform
    (_, bottom), (_, top) = scale((1.0, low)), scale((1.0, high))
    heights = [(scale((1.0, end))[1] - bottom) / (top - bottom) for end, _ in ends]
    places = spread_apart(heights, 0.085)
    for run, (_, number), place, color in zip(
        found, ends, places, cycle((*COLORS, INK)), strict=False
    ):
        axes.annotate(
            f"{run_title(run.config)}  ({number})",
            (1, place),
            (8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=10,
            fontweight="bold",
            color=color,
            annotation_clip=False,
        )


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
        mixer, number = run.config.pattern, run.config.num_householder
        numbers = PUBLISHED.get((mixer, number))
        published = PUBLISHED_IN_WORDS.get(mixer, "not published")
        if numbers is not None:
            published = f"{numbers[0]} → {numbers[1]} ({numbers[1] - numbers[0]:+.2f})"
        growth = run.at_end - run.at_training_length
        table.add_row(
            run_title(run.config),
            abbreviate(run.num_parameters),
            published,
            f"{run.at_training_length:.3f} → {run.at_end:.3f} ({growth:+.3f})",
            f"{run.seconds:.0f} s",
        )
    return table
