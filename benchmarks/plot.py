"""Draw the pictures of docs/img from the rows of `results/`: `python benchmarks/plot.py`."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "img"


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of one results file."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def cost_against_length() -> None:
    """Time of forward + backward per token, against T: a level line is a linear cost."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for row in read("length-cpu.csv"):
        _, length, n = row["case"].split("-")
        points[n][int(length)] = float(row["median_ms"])  # the newest row of a case counts
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for n, times in sorted(points.items()):
        lengths = sorted(times)
        per_token = [1e3 * times[T] / T for T in lengths]
        axes.plot(lengths, per_token, marker="o", label=f"N = {n[1:]}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens T")
    axes.set_ylabel("µs per token")
    axes.set_title("delta_product, forward + backward, one head of 64, two cores", loc="left")
    finish(axes)
    figure.savefig(IMAGES / "cost-against-length.png", dpi=150)


def state_tracking() -> None:
    """Whole-word accuracy of S₃ at the published code's scale, and the training of all groups."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read("state-tracking-accuracy-h200.csv"):
        label = f"S₃, N = {row['num_householder']}"
        curves[label].append((int(row["length"]), float(row["accuracy"])))
    for label, points in curves.items():
        left.plot(*zip(*sorted(points), strict=True), label=label)
    left.axvspan(0, 128, color="0.93", zorder=0)
    left.set_xlabel("position (trained up to 128)")
    left.set_ylabel("whole words right up to here")
    left.set_title("One layer, d = 128, H200", loc="left")

    losses: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read("state-tracking-training-h200.csv"):
        if row["run"] in PUBLISHED_RUNS:
            task = PUBLISHED_RUNS[row["run"]]
            label = f"{task}, N = {row['num_householder']}"
            losses[label].append((int(row["step"]), float(row["token_accuracy"])))
    for label, points in losses.items():
        right.plot(*zip(*sorted(points), strict=True), label=label)
    right.set_xlabel("step (batches of 2048 words of 128)")
    right.set_ylabel("tokens right while training")
    right.set_title("Only S₃ is learnt in 4,900 steps", loc="left")
    for axes in (left, right):
        axes.set_ylim(-0.02, 1.02)
        finish(axes)
    right.legend(frameon=False, loc="upper right")
    figure.savefig(IMAGES / "state-tracking-h200.png", dpi=150)


# The runs at the settings of the published code's README, and what they learn.
PUBLISHED_RUNS = {
    "s3-1-bf16": "S₃",
    "s3-2-bf16": "S₃",
    "s4-1": "S₄",
    "s4-2": "S₄",
    "a5-1": "A₅",
    "a5-2": "A₅",
    "s5-3": "S₅",
    "s5-4": "S₅",
}


def finish(axes: Axes) -> None:
    """Give the axes what all pictures share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    cost_against_length()
    state_tracking()
