"""Runs of a comparison with their display, for `train` and `reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from householder.train.comparison import Comparison, run_comparison, stored_settings, taken
from householder.train.errors import ConfigError
from householder.train.interrupt import stop_on_signals
from householder.train.loop import TrainResult


def refuse_both(resume: bool, overwrite: bool) -> None:
    """Refuse to continue a folder and to delete it."""
    if resume and overwrite:
        raise ConfigError("--resume continues and --overwrite deletes the same folder; give one")


def run_chosen(
    chosen: dict[str, Any], given: dict[str, Any], folder: Path, *, resume: bool, overwrite: bool
) -> list[TrainResult]:
    """Run what is `chosen`, or what a resumed folder began with, changed by what is `given`."""
    refuse_both(resume, overwrite)
    base = stored_settings(folder) if resume else chosen
    if "mixer" in given:
        base = taken(base, given["mixer"])
    comparison = Comparison.from_settings({**base, **given})
    return _run_and_show(comparison, folder, resume=resume, overwrite=overwrite)


def _run_and_show(
    comparison: Comparison, folder: Path, *, resume: bool, overwrite: bool
) -> list[TrainResult]:
    """Run a comparison, print its progress and its table, and return the results."""
    from householder.train.progress import ProgressDisplay
    from householder.train.report import describe, results_table, verdict

    console = Console()
    display = ProgressDisplay(comparison.configs, console, heading=describe(comparison))
    with stop_on_signals() as stop, display:
        results = run_comparison(
            comparison, folder, resume=resume, overwrite=overwrite, observer=display, stop=stop
        )
    console.print(results_table(results))
    console.print(verdict(results), highlight=False)
    console.print(f"curves: {folder / 'accuracy.png'}", highlight=False, soft_wrap=True)
    return results
