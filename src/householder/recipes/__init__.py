"""Published experiments, one file each: what was published beside what is measured here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Experiment:
    """A published experiment that `householder reproduce` can repeat.

    Attributes:
        name: the command's name.
        what: what is done.
        published: the published result, in a line.
        where: "Title (Authors, Year), URL".
        cost: what it takes to run.
        command: how to run it.
    """

    name: str
    what: str
    published: str
    where: str
    cost: str
    command: str


EXPERIMENTS = (
    Experiment(
        name="state-tracking",
        what="Train on the word problems of S3, S4, A5 and S5 and extrapolate in length.",
        published="One layer with β in (0, 2) needs N = 2 reflections for S3, S4 and A5, 4 for S5.",
        where="DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products "
        "(Siems, Carstensen, Zela, Hutter, Pontil, Grazzi, 2025), https://arxiv.org/abs/2502.10297",
        cost="--size cpu: minutes on two cores (S3, S4, A5); --size gpu: one GPU",
        command="householder reproduce state-tracking --task s3 --num-householder 1,2",
    ),
    Experiment(
        name="flip-flop",
        what="Train one layer of attention to remember the bit written last, and test it on longer "
        "and shorter memories than it was trained on.",
        published="Wrong reads as trained / sparse / dense: PaTH 0 / 0.0001 / 0%, "
        "RoPE 6.9 / 40.3 / 0.01%, FoX 8.3 / 36.3 / 0%.",
        where="PaTH Attention: Position Encoding via Accumulating Householder Transformations "
        "(Yang et al., 2025), https://arxiv.org/abs/2505.16381",
        cost="--size cpu: minutes on two cores; --size gpu: one GPU",
        command="householder reproduce flip-flop",
    ),
    Experiment(
        name="a5-attention",
        what="Count the layers that attention needs for the word problem of A5.",
        published="With products of reflectors fewer than with rotary positions (a figure).",
        where="PaTH Attention: Position Encoding via Accumulating Householder Transformations "
        "(Yang et al., 2025), https://arxiv.org/abs/2505.16381",
        cost="--size cpu: minutes on two cores; --size gpu: one GPU",
        command="householder reproduce a5-attention",
    ),
    Experiment(
        name="recall",
        what="Train two layers at several widths to recall 64 values by their keys (MQAR).",
        published="DeltaNet without convolutions answers about 100% of the queries from d = 64 to "
        "256 (a figure).",
        where="Parallelizing Linear Transformers with the Delta Rule over Sequence Length (Yang, "
        "Wang, Zhang, Shen, Kim, 2024), https://arxiv.org/abs/2406.06484",
        cost="--size cpu: minutes on two cores; --size gpu: one GPU, hours",
        command="householder reproduce recall",
    ),
    Experiment(
        name="length-extrapolation",
        what="Train small language models on source code and measure their loss at every position "
        "to eight times the length they were trained at.",
        published="From 4,096 to about 30,000 tokens of code (figures): DeltaNet 3.03 to 3.37, "
        "DeltaProduct N = 2 2.95 to 3.05, N = 3 2.95 to 2.97; RoPE explodes, PaTH extrapolates.",
        where="DeltaProduct (2025), https://arxiv.org/abs/2502.10297; PaTH Attention (Yang et al., "
        "2025), https://arxiv.org/abs/2505.16381",
        cost="--size cpu: minutes on two cores; --size gpu: one GPU",
        command="householder reproduce length-extrapolation",
    ),
    Experiment(
        name="constructions",
        what="Build the exact solutions known from theory and run them, without training.",
        published="S_n by n − 1 reflections in one layer, S4 and A5 as rotations by 2, "
        "Z_m and D_m by two layers of single reflections.",
        where="Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues (Grazzi, "
        "Siems, Zela, Franke, Hutter, Pontil, 2024), https://arxiv.org/abs/2411.12537; "
        "DeltaProduct (2025), https://arxiv.org/abs/2502.10297",
        cost="seconds on a CPU",
        command="householder reproduce constructions",
    ),
    Experiment(
        name="adapters",
        what="Train a small ViT on half of the classes of some images and adapt it to the others: "
        "HTA, HRA, two-sided, LoRA, full fine-tuning, linear probe.",
        published="Means of ViT-B/16 over VTAB-1k: HTA 74.7, LoRA 72.3, full 65.6; over FGVC: "
        "90.6, 89.5, 88.5. Another data set and model than what runs here.",
        where="Efficient Adaptation of Pre-trained Vision Transformer via Householder "
        "Transformation (Dong et al., 2024), https://arxiv.org/abs/2410.22952",
        cost="scikit-learn's digits: minutes on two cores; --images: any folder of images",
        command="householder reproduce adapters",
    ),
)


def experiments_table() -> Table:
    """Return the list of experiments, to print on a terminal."""
    from rich.table import Table

    table = Table(
        title="Published experiments", title_justify="left", show_header=False, show_lines=True
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for e in EXPERIMENTS:
        details = Table.grid(padding=(0, 1))
        details.add_column(style="dim", no_wrap=True)
        details.add_column(overflow="fold")
        for heading in ("what", "published", "where", "cost"):
            details.add_row(heading, getattr(e, heading))
        details.add_row("run", f"[bold]{e.command}[/bold]")
        table.add_row(e.name, details)
    return table
