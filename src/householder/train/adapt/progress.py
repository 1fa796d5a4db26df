"""Live progress of `householder adapt`, on a terminal or in a log file."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from householder.train.adapt.config import AdaptConfig
from householder.train.adapt.run import AdaptObserver
from householder.train.progress import LINES_PER_RUN


class AdaptDisplay(AdaptObserver):
    """Show a bar with loss, speed and time left; without a terminal, ten lines per run.

    Args:
        steps: of the run.
        console: where to draw.
    """

    def __init__(self, steps: int, console: Console) -> None:
        self._steps, self._console, self._printed = steps, console, 0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[report]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("adapt", start=False, total=steps, report="")

    def __enter__(self) -> AdaptDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def started(self, config: AdaptConfig, step: int, trained: int, total: int) -> None:
        self._console.print(
            f"{config.kind} on {config.model}: {trained:,} numbers trained beside {total:,} "
            f"({trained / total:.2%})",
            highlight=False,
        )
        if step:
            self._console.print(f"resumed at step {step}", highlight=False)
        self._progress.start_task(self._bar)
        self._progress.update(self._bar, completed=step)

    def stepped(self, step: int) -> None:
        self._progress.update(self._bar, completed=step)

    def logged(self, record: dict[str, Any]) -> None:
        report = f"loss {record['loss']:.4f}  {record['examples_per_second']:.1f} examples/s"
        self._progress.update(self._bar, report=report)
        tenth = LINES_PER_RUN * record["step"] // self._steps
        if not self._console.is_terminal and tenth > self._printed:
            self._printed = tenth
            left = record["seconds"] / record["step"] * (self._steps - record["step"])
            self._console.print(
                f"{record['step']}/{self._steps}  {report}  {left:.0f} s left", highlight=False
            )

    def said(self, what: str) -> None:
        self._progress.update(self._bar, report=what)
        if not self._console.is_terminal:
            self._console.print(what, highlight=False)
