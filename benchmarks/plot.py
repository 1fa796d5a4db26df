"""Draw the pictures of docs/img from the rows of `results/`: `python benchmarks/plot.py`."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

from recording import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

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


def delta_product_gpu() -> None:
    """Time against T at N = 1 and against N, with the peer and the floor, on a GPU."""
    newest = {(row["case"], row["variant"]): row for row in read("delta-product-gpu.csv")}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, group, size in (
        (panels[0], "length", lambda case: int(case.split("-")[1].split("x")[1])),
        (panels[1], "reflections", lambda case: int(case.split("-")[2][1:])),
    ):
        curves: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        for (case, variant), row in newest.items():
            if case.startswith(group + "-"):
                for part in ("forward", "both"):
                    curves["floor", part][size(case)] = float(row[f"floor_{part}_ms"])
                    if row[f"{part}_ms"] not in ("", "nan"):  # a peer may refuse
                        curves[variant, part][size(case)] = float(row[f"{part}_ms"])
        for (variant, part), times in sorted(curves.items()):
            xs = sorted(times)
            axes.plot(
                xs,
                [times[x] for x in xs],
                marker="" if variant == "floor" else "o",
                markersize=4,
                color={"householder": "C0", "fla": "C1", "floor": "0.5"}[variant],
                linestyle="-" if part == "both" else "--",
                label=f"{variant}, {'forward + backward' if part == 'both' else 'forward'}",
            )
        axes.set_ylabel("ms")
        finish(axes)
        axes.get_legend().remove()
    # Measured at one length, as called.
    case = "table-1x32768x16x128-n1-ungated"
    (other,) = (row for row in read("delta-product-gpu-flashqla.csv") if row["case"] == case)
    for part in ("forward", "both"):
        panels[0].plot(
            32768,
            float(other[f"called_{part}_ms"]),
            marker="s" if part == "both" else "D",
            linestyle="",
            markersize=5,
            color="C2",
            label=f"FlashQLA, {'forward + backward' if part == 'both' else 'forward'}",
        )
    panels[0].set_xscale("log", base=2)
    panels[0].set_yscale("log")
    panels[0].set_xlabel("tokens T (one sequence, 16 heads of 128, N = 1)")
    panels[0].set_title("delta_product, bfloat16, H200", loc="left")
    panels[1].set_ylim(bottom=0)
    panels[1].set_xlabel("reflections a token N (4 sequences of 4,096, 16 heads of 128)")
    panels[1].legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8)
    figure.savefig(IMAGES / "delta-product-gpu.png", dpi=150)


def path_attention_gpu() -> None:
    """Time and memory of forward + backward against T, with attention without positions and fla."""
    newest = {(row["case"], row["variant"]): row for row in read("path-attention-gpu.csv")}
    names = {"householder": "path_attention", "fla": "fla", "sdpa": "SDPA, no positions"}
    colors = {"householder": "C0", "fla": "C1", "sdpa": "C2", "floor": "0.5"}
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, D, column in zip(
        panels, (64, 128, 128), ("both_ms", "both_ms", "both_peak_mib"), strict=True
    ):
        curves: dict[str, dict[int, float]] = defaultdict(dict)
        for (case, variant), row in newest.items():
            sizes = [int(x) for x in case.split("-")[1].split("x")]
            if sizes[0] == 1 and sizes[3] == D:
                if column == "both_ms" and row["floor_both_ms"]:
                    curves["floor"][sizes[1]] = float(row["floor_both_ms"])
                if row[column]:
                    curves[variant][sizes[1]] = float(row[column])
        for variant in ("fla", "householder", "sdpa", "floor"):
            if variant in curves:
                axes.plot(
                    *zip(*sorted(curves[variant].items()), strict=True),
                    marker="" if variant == "floor" else "o",
                    markersize=4,
                    color=colors[variant],
                    label=names.get(variant, "floor"),
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens T")
        axes.set_ylabel("ms" if column == "both_ms" else "MiB")
        what = "Forward + backward" if column == "both_ms" else "Peak memory"
        axes.set_title(f"{what}, 16 heads of {D}", loc="left")
        finish(axes)
    figure.savefig(IMAGES / "path-attention-gpu.png", dpi=150)


GROUPS = {"s3": "S₃", "s4": "S₄", "a5": "A₅", "s5": "S₅"}


def state_tracking() -> None:
    """Whole-word accuracy by position, and tokens right while training, for every group and N."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, name, x, y in (
        (left, "accuracy", "length", "accuracy"),
        (right, "training", "step", "token_accuracy"),
    ):
        curves: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
        for row in read(f"state-tracking-{name}-h200.csv"):
            if row["seed"] == "0":
                point = int(row[x]), float(row[y])
                curves[row["task"], int(row["num_householder"])].append(point)
        for (task, n), points in sorted(
            curves.items(), key=lambda c: (list(GROUPS).index(c[0][0]), c[0][1])
        ):
            enough = n == max(m for other, m in curves if other == task)
            axes.plot(
                *zip(*sorted(points), strict=True),
                label=f"{GROUPS[task]}, N = {n}",
                color=f"C{list(GROUPS).index(task)}",
                linestyle="-" if enough else "--",
            )
        axes.set_ylim(-0.02, 1.02)
        finish(axes)
    left.axvspan(0, 128, color="0.93", zorder=0)
    left.set_xlabel("position (trained up to 128)")
    left.set_ylabel("whole words right up to here")
    left.set_title("One layer, d = 128, H200", loc="left")
    left.get_legend().remove()
    right.set_xlabel("step (words grow from 3 to 128 over the first 6,000)")
    right.set_ylabel("tokens right while training")
    right.set_title("Dashed: one reflection too few", loc="left")
    right.legend(frameon=False, ncols=2, loc="center right")
    figure.savefig(IMAGES / "state-tracking-h200.png", dpi=150)


ATTENTIONS = {
    "path_attention": ("PaTH", "C0"),
    "rotary_attention": ("RoPE", "C1"),
    "forgetting_attention": ("FoX", "C2"),
}


def a5_attention() -> None:
    """Whole words right by length for every depth, and the fewest layers above 90%."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    # Of several runs the one with which longer words are right.
    runs: dict[tuple[str, int, str], dict[int, float]] = defaultdict(dict)
    for row in read("a5-attention-h200.csv"):
        if row["seed"] == "0":
            another = row["lr"] + row["steps"] + row["cuda_graphs"]
            run = row["mixer"], int(row["num_layers"]), another
            runs[run][int(row["length"])] = float(row["word_accuracy"])
    curves: dict[tuple[str, int], dict[int, float]] = {}
    for (mixer, layers, _), accuracy in sorted(runs.items(), key=lambda x: sum(x[1].values())):
        curves[mixer, layers] = accuracy
    styles = {1: ":", 2: "-.", 3: "--", 4: "-"}
    for mixer, (name, color) in ATTENTIONS.items():
        fewest: dict[int, int] = {}
        for (other, layers), accuracy in sorted(curves.items()):
            if other == mixer:
                label = f"{name}, {layers} layer{'s' if layers > 1 else ''}"
                left.plot(
                    *zip(*sorted(accuracy.items()), strict=True),
                    color=color,
                    linestyle=styles[layers],
                    label=label,
                )
                for length in sorted(accuracy):
                    if accuracy[length] <= 0.9:
                        break
                    fewest.setdefault(length, layers)
        if fewest:
            # Side by side where they coincide.
            shift = 0.05 * list(ATTENTIONS).index(mixer)
            heights = [n + shift for n in fewest.values()]
            right.plot(list(fewest), heights, color=color, drawstyle="steps-mid", label=name)
            right.plot(list(fewest)[-1:], heights[-1:], color=color, marker="|", markersize=10)
    left.axhline(0.9, color="0.6", linewidth=0.8)
    for axes in (left, right):
        axes.axvline(16, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel("length of the word (trained up to 16)")
        finish(axes)
    left.set_ylabel("whole words right")
    left.set_title("Words over A₅, d = 128, 4 heads, H200", loc="left")
    left.legend(frameon=False, fontsize=8)
    right.set_yticks([1, 2, 3, 4])
    right.set_ylim(0.5, 4.5)
    right.set_ylabel("fewest layers above 90%")
    right.set_title("A line ends where no depth is enough", loc="left")
    figure.savefig(IMAGES / "a5-attention-h200.png", dpi=150)


def decoding() -> None:
    """Time of decoded tokens against those before and their number, and the outputs' drift."""
    if not (RESULTS / "decoding-gpu.csv").exists():
        return
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    single: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    several: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for row in read("decoding-gpu.csv"):
        curve, us = (int(row["B"]), row["variant"]), float(row["us"])
        if row["N"] == "1":
            single[curve][int(row["T"])] = us
        if row["T"] == "4096":
            several[curve][int(row["N"])] = us
    for axes, curves in ((left, single), (middle, several)):
        for (B, variant), times in sorted(curves.items()):
            ours = variant == "householder"
            axes.plot(
                *zip(*sorted(times.items()), strict=True),
                marker="o",
                label=f"{'path_attention' if ours else variant}, B = {B}",
                color="C0" if B == 1 else "C1",
                linestyle={"householder": "-", "torch SDPA": "--"}.get(variant, ":"),
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylabel("µs")
    left.set_xlabel("tokens in the cache")
    left.set_title("One token, H = 16, K = 128, bfloat16, H200", loc="left")
    left.set_ylim(top=2e4)  # room for the legend
    finish(left)
    middle.set_xlabel("new tokens")
    middle.set_title("Several tokens after 4,096", loc="left")
    middle.set_ylim(bottom=6)
    finish(middle)
    names = {
        "decoded": "one by one",
        "prefilled": "after a prefill",
        "forward": "full forward pass",
    }
    drift: dict[str, dict[int, float]] = defaultdict(dict)
    for row in read("decoding-drift-gpu.csv"):
        for name in names:
            drift[name][int(row["T"])] = float(row[name])
    for name, errors in drift.items():
        style = "--" if name == "prefilled" else "-"  # it lies on the one before
        points = zip(*sorted(errors.items()), strict=True)
        right.plot(*points, marker="o", linestyle=style, label=names[name])
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.set_xlabel("tokens decoded")
    right.set_ylabel("error of the last 128 outputs")
    right.set_title("Reflections, bfloat16", loc="left")
    finish(right)
    figure.savefig(IMAGES / "decoding-h200.png", dpi=150)


SOURCES = {"householder-compiled": "householder", "householder": "householder", "fla": "fla"}


def language_models() -> None:
    """Training steps and writing of 340M models beside the peer's."""
    panels = (
        ("language-model-gpu.csv", "train-340m-", "tokens per second, training, 8 × 4,096"),
        ("language-model-decoding-gpu.csv", "decode-340m-", "tokens per second, writing"),
    )
    if not all((RESULTS / name).exists() for name, *_ in panels):
        return
    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, (name, prefix, label) in zip(both, panels, strict=True):
        speeds: dict[str, dict[str, float]] = defaultdict(dict)
        for row in read(name):  # the newest row of a case counts
            if row["variant"] in ("householder-compiled", "fla") or "decode" in row["case"]:
                source = SOURCES.get(row["variant"])
                if source and row["tokens_per_second"]:
                    case = row["case"].removeprefix(prefix).replace("-8x4096-", ",\n")
                    case = case.replace("gated_delta_net-", "").replace("-", " ")
                    case = case.replace("gated_delta_net", "Gated DeltaNet")
                    case = case.replace("gated_delta_product", "Gated Delta\nProduct")
                    speeds[case][source] = float(row["tokens_per_second"])
        speeds = dict(sorted(speeds.items(), key=lambda item: (len(item[0]), item[0])))
        for i, source in enumerate(("householder", "fla")):
            heights = [speeds[case].get(source, 0.0) for case in speeds]
            places = [x + 0.4 * i for x in range(len(speeds))]
            bars = axes.bar(places, heights, width=0.38, label=source, color=f"C{i}")
            axes.bar_label(bars, [f"{h:,.0f}" if h else "" for h in heights], fontsize=8)
        axes.set_xticks([x + 0.2 for x in range(len(speeds))], list(speeds), fontsize=8)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
        finish(axes)
    both[1].set_yscale("log")
    both[0].set_title("340M parameters, H200", loc="left")
    both[1].set_title("Gated DeltaNet, bfloat16", loc="left")
    figure.savefig(IMAGES / "language-models-h200.png", dpi=150)


def finish(axes: Axes) -> None:
    """Give the axes what all pictures share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    cost_against_length()
    state_tracking()
    delta_product_gpu()
    path_attention_gpu()
    a5_attention()
    decoding()
    language_models()
