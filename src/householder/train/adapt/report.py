"""What a run of `householder adapt` has come to, as a table."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table

from householder.train.adapt.run import AdaptResult


def results_table(result: AdaptResult, folder: Path) -> Table:
    """Return a table of the scores before and after, the cost, and where everything is.

    Args:
        result: of the run.
        folder: where it wrote.
    """
    config = result.config
    table = Table(title=f"{config.kind} on {config.model}", title_justify="left", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    before, after = result.before, result.after
    if config.data is not None and Path(config.data).is_dir():
        accuracy = f"{after.accuracy:.1%} (untrained classifier {before.accuracy:.1%})"
        table.add_row("accuracy", accuracy)
        table.add_row("loss", f"{after.loss:.4f}")
    else:
        table.add_row("loss per token", f"{after.loss:.4f} (base model {before.loss:.4f})")
        table.add_row("perplexity", f"{_exp(after.loss)} (base model {_exp(before.loss)})")
    share = result.num_parameters / result.base_parameters
    table.add_row("numbers trained", f"{result.num_parameters:,} ({share:.2%} of the base model)")
    table.add_row("training", f"{result.seconds:.1f} s")
    table.add_row("adapter", str(folder / "adapter"))
    if result.merge_error is not None:
        merged = f"{folder / 'merged'} (logits differ by {result.merge_error:.1e})"
        table.add_row("merged model", merged)
    return table


def _exp(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 50 else "above 1e21"
