"""Runs that differ in N, mixer or depth, in one folder: what `householder train` and recipes do.

<out>/config.toml          the settings; `householder train --config` takes it
<out>/<run>/               one folder per run: metrics.jsonl, checkpoints/
<out>/results.json         settings, cost and accuracy of each run
<out>/accuracy.csv         accuracy by length, one column per run
<out>/accuracy.png         the same as curves
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from householder.nn import MIXERS
from householder.storage import write_atomically
from householder.train.config import TrainConfig, takes_several
from householder.train.errors import ConfigError
from householder.train.interrupt import StopRequest
from householder.train.loop import TrainResult, train
from householder.train.observer import Observer
from householder.train.output_folder import OutputFolder
from householder.train.settings import (
    check_names,
    differences,
    field_default,
    field_types,
    read_toml,
)

# What `run_comparison` and the recipes write beside it.
RESULT_FILES = (
    *("results.json", "accuracy.csv", "accuracy.png"),
    *("errors.csv", "errors-by-distance.csv", "errors.png", "transitions.png"),
    *("layers.csv", "layers.png"),
)
# What the runs of a comparison may differ in.
COMPARED = ("mixer", "num_layers", "num_householder")
# What attentions do not take. Beside recurrent mixers it is theirs alone.
RECURRENT_ONLY = ("allow_neg_eigval", "use_short_conv")
HEADER = "# Written by householder: the settings of the runs in this folder.\n"


@dataclass(frozen=True)
class Comparison:
    """Settings of runs that differ only in mixer, number of layers or reflections per token.

    Attributes:
        configs: the settings of each run.

    Examples:
        >>> comparison = Comparison.from_settings({"task": "s3", "num_householder": [1, 2]})
        >>> [config.name for config in comparison.configs]
        ['s3-N1', 's3-N2']
        >>> mixers = {"mixer": ["path_attention", "rotary_attention"], "num_layers": [1, 2]}
        >>> [config.name for config in Comparison.from_settings({"task": "a5", **mixers}).configs]
        ... # doctest: +NORMALIZE_WHITESPACE
        ['a5-path-attention', 'a5-path-attention-L2',
         'a5-rotary-attention', 'a5-rotary-attention-L2']
    """

    configs: tuple[TrainConfig, ...]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Comparison:
        """Make a comparison from settings by name.

        Args:
            settings: fields of `TrainConfig`, of which `mixer`, `num_layers` and `num_householder`
                may be lists. Without `num_householder` it is 1 and 2, or 1 where a mixer takes no
                more. Where some of the mixers take several reflections per token, it is theirs
                alone, and the others have one; where some are recurrent, `allow_neg_eigval` and
                `use_short_conv` are theirs alone, and attentions keep the defaults.

        Returns:
            The comparison: a run for each combination, the first list the slowest.

        Raises:
            ConfigError: a setting is unknown or cannot be, or a list is empty or repeats itself.
        """
        check_names(settings, field_types(TrainConfig), "settings")
        shared = dict(settings)
        lists = {name: _as_list(name, shared.pop(name)) for name in COMPARED if name in shared}
        lists.setdefault("mixer", [field_default(TrainConfig, "mixer")])
        if "num_householder" not in lists:
            lists["num_householder"] = [1, 2] if all(map(takes_several, lists["mixer"])) else [1]
        names = [name for name in COMPARED if name in lists]
        some_take_several = any(map(takes_several, lists["mixer"]))
        some_recurrent = any(mixer in MIXERS for mixer in lists["mixer"])
        of_attention = {k: v for k, v in shared.items() if k not in RECURRENT_ONLY}
        configs = []
        for values in itertools.product(*(lists[name] for name in names)):
            chosen = dict(zip(names, values, strict=True))
            if some_take_several and not takes_several(chosen["mixer"]):
                chosen["num_householder"] = 1
            apart = some_recurrent and chosen["mixer"] not in MIXERS
            configs.append(TrainConfig(**(of_attention if apart else shared), **chosen))
        return cls(tuple(dict.fromkeys(configs)))

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `from_settings` makes the same comparison."""
        return {**self.shared.to_dict(), **self.compared()}

    @property
    def shared(self) -> TrainConfig:
        """The run that has every setting that was asked for: a recurrent one if there is one."""
        recurrent = [config for config in self.configs if config.mixer in MIXERS]
        return (recurrent or self.configs)[0]

    def compared(self) -> dict[str, Any]:
        """Return what the runs may differ in: the value, or the list of values where they do."""
        found = {}
        taking = [config for config in self.configs if takes_several(config.mixer)]
        for name in COMPARED:
            configs = taking if name == "num_householder" and taking else self.configs
            values = list(dict.fromkeys(getattr(config, name) for config in configs))
            # N is what most comparisons are about, and a list even when alone.
            alone = len(values) == 1 and name != "num_householder"
            found[name] = values[0] if alone else values
        return found


def taken(settings: Mapping[str, Any], mixer: Any) -> dict[str, Any]:
    """Return settings without those that no mixer takes of the ones that will run with them.

    Args:
        settings: chosen for other mixers, perhaps.
        mixer: the mixer, or a list of mixers, that will run.

    Examples:
        >>> chosen = {"steps": 3, "use_short_conv": True, "num_householder": [2]}
        >>> taken(chosen, ["delta_net", "rotary_attention"])
        {'steps': 3, 'use_short_conv': True}
        >>> taken(chosen, "rotary_attention")
        {'steps': 3}
    """
    mixers = _as_list("mixer", mixer)
    left_out: set[str] = set()
    if not any(map(takes_several, mixers)):
        left_out.add("num_householder")
    if not any(name in MIXERS for name in mixers):
        left_out.update(RECURRENT_ONLY)
    return {name: value for name, value in settings.items() if name not in left_out}


def _as_list(name: str, value: Any) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values or len(set(values)) != len(values):
        raise ConfigError(
            f"`{name}` must list different {'mixers' if name == 'mixer' else 'numbers'}, "
            f"got {values}; give each once"
        )
    return values


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the comparison that a folder holds.

    Raises:
        OutputError: the folder holds none.
        ConfigError: its config file is damaged.
    """
    return read_toml(_output(folder).require_config(), field_types(TrainConfig))


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
    output = _output(folder)
    output.open(
        comparison.settings(),
        resume=resume,
        overwrite=overwrite,
        check_same=lambda: _check_same_runs(comparison, output),
    )


def _output(folder: Path) -> OutputFolder:
    return OutputFolder(folder, HEADER, lambda p: p.name in RESULT_FILES or _is_run(p))


def _is_run(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir() if not p.name.startswith(".")}
    return names <= {"metrics.jsonl", "checkpoints"}


def _check_same_runs(comparison: Comparison, output: OutputFolder) -> None:
    stored = Comparison.from_settings(stored_settings(output.path))
    there, requested = stored.compared(), comparison.compared()
    different: dict[str, tuple[Any, Any]] = {
        name: (there[name], requested[name]) for name in COMPARED if there[name] != requested[name]
    }
    # But for what is compared, one run speaks for all.
    one, other = stored.shared, comparison.shared
    alike = dataclasses.replace(one, **{name: getattr(other, name) for name in COMPARED})
    output.require_same(different | differences(alike, other))


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
