"""Runs that differ only in N, in one folder: what `householder train` and the recipes do.

<out>/config.toml          the settings; `householder train --config` takes it
<out>/<run>/               one folder per N: metrics.jsonl, checkpoints/
<out>/results.json         settings, cost and accuracy of each run
<out>/accuracy.csv         accuracy by length, one column per run
<out>/accuracy.png         the same as curves
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from householder.train.config import TrainConfig
from householder.train.errors import CheckpointError, ConfigError, OutputError
from householder.train.interrupt import StopRequest
from householder.train.loop import TrainResult, train
from householder.train.observer import Observer
from householder.train.settings import (
    check_names,
    describe_differences,
    differences,
    field_types,
    read_toml,
    to_toml,
)
from householder.train.storage import write_atomically

CONFIG_FILE = "config.toml"
RESULT_FILES = ("results.json", "accuracy.csv", "accuracy.png")
HEADER = "# Written by householder: the settings of the runs in this folder.\n"


@dataclass(frozen=True)
class Comparison:
    """Settings of runs that differ only in the number of reflections per token.

    Attributes:
        configs: the settings of each run.

    Examples:
        >>> comparison = Comparison.from_settings({"task": "s3", "num_householder": [1, 2]})
        >>> [config.name for config in comparison.configs]
        ['s3-N1', 's3-N2']
    """

    configs: tuple[TrainConfig, ...]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Comparison:
        """Make a comparison from settings by name.

        Args:
            settings: fields of `TrainConfig`, of which `num_householder` may be a list.

        Returns:
            The comparison, its runs in the order of the list.

        Raises:
            ConfigError: a setting is unknown or cannot be, or the list repeats a number.
        """
        check_names(settings, field_types(TrainConfig), "settings")
        shared = dict(settings)
        numbers = shared.pop("num_householder", [1, 2])
        numbers = list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]
        if not numbers or len(set(numbers)) != len(numbers):
            raise ConfigError(f"`num_householder` must list different numbers, got {numbers}")
        return cls(tuple(TrainConfig(**shared, num_householder=n) for n in numbers))

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `from_settings` makes the same comparison."""
        return {
            **self.configs[0].to_dict(),
            "num_householder": [config.num_householder for config in self.configs],
        }


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the comparison that a folder holds.

    Raises:
        OutputError: the folder holds none.
        ConfigError: its config file is damaged.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise OutputError(
            f"{folder}: nothing to resume, there is no {CONFIG_FILE}; start without --resume"
        )
    return read_toml(path, field_types(TrainConfig))


def run_comparison(
    comparison: Comparison,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop: StopRequest | None = None,
) -> list[TrainResult]:
    """Train and evaluate every run of a comparison and write its results.

    Args:
        comparison: what to run.
        folder: where to write; made when missing.
        resume: continue what the folder holds; runs that are done are only evaluated again.
        overwrite: delete what the folder holds from an earlier comparison.
        observer: told of every step of every run.
        stop: looked at after every step.

    Returns:
        The result of each run.

    Raises:
        OutputError: the folder is occupied and neither `resume` nor `overwrite` is given, cannot be
            written, or holds nothing to resume.
        CheckpointError: what the folder holds is damaged or of other settings.
        RunError: as in `householder.train.train`.
    """
    open_folder(comparison, folder, resume=resume, overwrite=overwrite)
    results = []
    for config in comparison.configs:
        run_folder = folder / config.name
        results.append(train(config, run_folder, resume=resume, observer=observer, stop=stop))
        write_results(results, folder)
    return results


def open_folder(
    comparison: Comparison, folder: Path, *, resume: bool = False, overwrite: bool = False
) -> None:
    """Make the output folder ready, or say why it cannot be.

    Args:
        comparison: what will be written there.
        folder: the folder.
        resume: it must hold a comparison of the same runs.
        overwrite: what it holds is deleted, if it is an earlier comparison.

    Raises:
        OutputError: it is occupied, cannot be written, or holds nothing to resume.
        CheckpointError: the runs it holds are others.
    """
    if resume and overwrite:
        raise ConfigError("`resume` continues and `overwrite` deletes the same folder; give one")
    try:
        # Names with a leading dot are what a kill leaves of a file being written.
        occupied = folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir())
        if resume:
            _check_same_runs(comparison, folder)
        elif occupied and not overwrite:
            raise OutputError(
                f"{folder}: the output folder is occupied; continue with --resume, replace it with "
                "--overwrite, or choose another with --out"
            )
        elif occupied:
            _delete_comparison(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG_FILE, HEADER + to_toml(comparison.settings()))
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot write the output folder: {error.strerror}; choose another with --out"
        ) from error


def _delete_comparison(folder: Path) -> None:
    """Delete what `run_comparison` wrote; touch nothing when there is anything else."""
    config = folder / CONFIG_FILE
    if not config.is_file() or not config.read_bytes().startswith(HEADER.encode()):
        raise OutputError(
            f"{folder}: nothing is deleted, because no {CONFIG_FILE} says that householder wrote "
            "this folder; choose another with --out"
        )
    ours = [path for path in folder.iterdir() if path.name in RESULT_FILES or _is_run(path)]
    foreign = sorted({p.name for p in folder.iterdir()} - {p.name for p in ours} - {CONFIG_FILE})
    if foreign:
        raise OutputError(
            f"{folder}: nothing is deleted, because {', '.join(foreign)} is not householder's; "
            "move it away or choose another folder with --out"
        )
    for path in ours:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    # Last: what a kill leaves half deleted can be overwritten again.
    config.unlink()


def _is_run(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir() if not p.name.startswith(".")}
    return names <= {"metrics.jsonl", "checkpoints"}


def _check_same_runs(comparison: Comparison, folder: Path) -> None:
    stored = Comparison.from_settings(stored_settings(folder))
    there, requested = ([c.num_householder for c in x.configs] for x in (stored, comparison))
    different: dict[str, tuple[Any, Any]] = {}
    if there != requested:
        different["num_householder"] = there, requested
    # Without N, which differs between the runs, one run speaks for all.
    one, other = stored.configs[0], comparison.configs[0]
    same_n = dataclasses.replace(one, num_householder=other.num_householder)
    different.update(differences(same_n, other))
    if different:
        raise CheckpointError(
            f"{folder}: what it holds does not fit the requested settings: "
            f"{describe_differences(different)}; drop these settings or use another folder"
        )


def write_results(results: Sequence[TrainResult], folder: Path) -> None:
    """Write `results.json`, `accuracy.csv` and `accuracy.png`.

    Args:
        results: the runs that are done.
        folder: where to write.
    """
    from householder.train.plot import plot_accuracy

    summary = [
        {
            "name": r.config.name,
            "num_parameters": r.num_parameters,
            "steps": r.steps,
            "seconds": round(r.seconds, 3),
            "evaluation": dataclasses.asdict(r.evaluation),
            "config": r.config.to_dict(),
        }
        for r in results
    ]
    write_atomically(folder / "results.json", json.dumps(summary, indent=1) + "\n")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["length", *(r.config.name for r in results)])
    curves = [dict(zip(r.evaluation.lengths, r.evaluation.accuracy, strict=True)) for r in results]
    for length in sorted(set().union(*curves)):
        rows.writerow([length, *(curve.get(length, "") for curve in curves)])
    write_atomically(folder / "accuracy.csv", table.getvalue())
    write_atomically(folder / "accuracy.png", plot_accuracy(results))
