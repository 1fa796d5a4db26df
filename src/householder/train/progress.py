"""Live progress, on a terminal or in a log file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from householder.train.config import TrainConfig
from householder.train.evaluation import Evaluation
from householder.train.observer import Observer

# In a log file, where nothing can be redrawn: a line this many times per run.
LINES_PER_RUN = 10


class ProgressDisplay(Observer):
    """Show one bar per run with loss, accuracy, tokens per second and time left.

    Without a terminal, ten lines per run are printed instead.

    Args:
        configs: the runs to come, in order.
        console: where to draw.
        heading: printed when the first run starts.
    """

    def __init__(
        self, configs: Sequence[TrainConfig], console: Console, *, heading: str = ""
    ) -> None:
        self._console = console
        self._heading = heading
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[report]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[clock]}"),
            console=console,
            # Few redraws a second: they take time from the same cores that train.
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {
            config.name: self._progress.add_task(
                config.name, start=False, total=config.steps, report="waiting", clock=""
            )
            for config in configs
        }
        self._printed: dict[str, int] = {}

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, config: TrainConfig, step: int, num_parameters: int) -> None:
        """Start the run's bar, at the step it resumes from."""
        if self._heading:
            self._console.print(self._heading, highlight=False)
            self._heading = ""
        bar = self._bars[config.name]
        self._progress.start_task(bar)
        self._progress.update(bar, completed=step, report="", clock="left")
        if step:
            self._console.print(f"{config.name}: resumed at step {step}", highlight=False)

    def stepped(self, config: TrainConfig, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._bars[config.name], completed=step)

    def logged(self, config: TrainConfig, record: dict[str, Any]) -> None:
        """Show the newest loss, accuracy and speed."""
        if "loss" not in record:
            return
        report = (
            f"loss {record['loss']:.4f}  accuracy {record['accuracy']:6.1%}  "
            f"{abbreviate(record['tokens_per_second'])} tokens/s"
        )
        self._progress.update(self._bars[config.name], report=report)
        assert config.steps is not None
        tenth = LINES_PER_RUN * record["step"] // config.steps
        if not self._console.is_terminal and tenth > self._printed.get(config.name, 0):
            self._printed[config.name] = tenth
            left = record["seconds"] / record["step"] * (config.steps - record["step"])
            self._console.print(
                f"{config.name}  {record['step']}/{config.steps}  {report}  {left:.0f} s left",
                highlight=False,
            )

    def evaluating(self, config: TrainConfig) -> None:
        """Say that the run is trained and being evaluated."""
        self._progress.update(self._bars[config.name], report="evaluating", clock="")

    def finished(self, config: TrainConfig, evaluation: Evaluation) -> None:
        """Show the accuracy reached."""
        bar = self._bars[config.name]
        report = f"accuracy {evaluation.at(config.length):.1%} at length {config.length}"
        if evaluation.lengths[-1] > config.length:
            report += f", {evaluation.accuracy[-1]:.1%} at {evaluation.lengths[-1]}"
        self._progress.update(bar, report=report, clock="")
        self._progress.stop_task(bar)
        if not self._console.is_terminal:
            self._console.print(f"{config.name}  {report}", highlight=False)


def abbreviate(number: float) -> str:
    """Return a number with its thousands or millions abbreviated: 51.2k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
