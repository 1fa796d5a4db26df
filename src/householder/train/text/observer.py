"""What a training run on text tells whoever watches it, and the display of it on a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from householder.train.progress import abbreviate
from householder.train.text.config import TextConfig
from householder.train.text.evaluation import Perplexity


class TextObserver:
    """Watch a run; the methods do nothing here and are overridden as needed."""

    def tokenizing(self, tokens: int) -> None:
        """Note how many tokens of the text have been read."""

    def skipped(self, file: str) -> None:
        """Note a file that is no text."""

    def started(self, config: TextConfig, step: int, num_parameters: int, tokens: int) -> None:
        """Note that training begins, at a step above 0 when it is resumed."""

    def stepped(self, step: int) -> None:
        """Note that so many steps are done."""

    def logged(self, record: dict[str, Any]) -> None:
        """Note a new line of the metrics."""

    def sampled(self, step: int, text: str) -> None:
        """Note a text that the model has written."""

    def finished(self, results: Sequence[Perplexity]) -> None:
        """Note that the run is over, with its final evaluation."""


class TextDisplay(TextObserver):
    """Show a run as a progress bar, or as lines where there is no terminal.

    Without one there are twenty lines in a run, and one a minute in a run of slow steps.

    Args:
        console: where to print.
    """

    LINES = 20
    SECONDS = 60.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[report]}"),
            TimeRemainingColumn(),
            console=console,
            # Several steps of a large model on a slow machine.
            speed_estimate_period=600.0,
            # Each refresh takes time from the same cores that train.
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._steps = 0
        self._step_tokens = 0
        self._printed = -1
        self._printed_at = 0.0

    def __enter__(self) -> TextDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def skipped(self, file: str) -> None:
        """Print the file's name."""
        self._print(f"not text, left out: {file}")

    def started(self, config: TextConfig, step: int, num_parameters: int, tokens: int) -> None:
        """Say what is trained on what, and start the bar."""
        self._steps, self._step_tokens = config.steps, config.batch_size * config.context
        self._print(
            f"{config.pattern}: {abbreviate(num_parameters)} parameters, "
            f"{abbreviate(tokens)} tokens of text, {config.batch_size} × {config.context} a step"
        )
        if step:
            self._print(f"resumed at step {step}")
        self._bar = self._progress.add_task("train", total=config.steps, completed=step, report="")

    def stepped(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._progress.update(self._bar, completed=step)

    def logged(self, record: dict[str, Any]) -> None:
        """Show loss, speed and utilisation."""
        if "validation_loss" in record:
            self._print(
                f"step {record['step']}: validation loss {record['validation_loss']:.4f}, "
                f"perplexity {record['validation_perplexity']:.2f}"
            )
            return
        report = (
            f"loss {record['loss']:.4f}  {abbreviate(record['tokens_per_second'])} tokens/s"
            + (f"  MFU {record['mfu']:.1%}" if "mfu" in record else "")
        )
        if self._bar is not None:
            self._progress.update(self._bar, report=report)
        if self._console.is_terminal:
            return
        part, now = self.LINES * record["step"] // self._steps, time.monotonic()
        if part > self._printed or now > self._printed_at + self.SECONDS:
            self._printed, self._printed_at = part, now
            if remaining := self._steps - record["step"]:
                left = remaining * self._step_tokens / record["tokens_per_second"]
                report += f"  {timedelta(seconds=round(left))} left"
            self._print(f"{record['step']}/{self._steps}  {report}")

    def sampled(self, step: int, text: str) -> None:
        """Print the text."""
        self._print(f"sample at step {step}: {text!r}")

    def finished(self, results: Sequence[Perplexity]) -> None:
        """Print the perplexities."""
        table = Table("context", "loss", "perplexity", "tokens", title="held-out text")
        for r in results:
            table.add_row(str(r.context), f"{r.loss:.4f}", f"{r.perplexity:.2f}", str(r.tokens))
        self._console.print(table)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
