"""Write the tables of docs/benchmarks.md from the rows of `results/`.

    python benchmarks/tables.py

A table stands between `<!-- table: name -->` and `<!-- end -->`; the newest row of a case counts.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from recording import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Rows = dict[tuple[str, str], dict[str, str]]


def read(*names: str) -> Rows:
    """Return the newest row of each case and variant, in the order of their first appearance."""
    rows: Rows = {}
    for name in names:
        with (RESULTS / name).open(newline="") as file:
            rows |= {(row["case"], row["variant"]): row for row in csv.DictReader(file)}
    return rows


def figures(row: dict[str, str] | None, *columns: str) -> str:
    """Return a row's figures with three digits, or why there are none."""
    if row is None:
        return "–"
    values = [row[column] for column in columns if row[column] not in ("", "nan")]
    if len(values) < len(columns):
        return "refuses" if row["note"].startswith("refuses") else "–"
    return " / ".join(three_digits(value) for value in values)


def three_digits(value: str, factor: float = 1.0) -> str:
    return f"{factor * float(value):#.3g}".removesuffix(".")


def markdown(header: str, lines: list[list[str]]) -> str:
    """Return a table; `header` holds the columns' names between bars."""
    rule = "|" + "---|" * header.count(" | ") + "---|"
    return "\n".join([f"| {header} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def sizes(case: str) -> tuple[list[int], str, str]:
    """Split a case's name into B, T, H and D, N, and whether there are gates."""
    _, shape, n, gate = case.split("-")[:4]
    return [int(x) for x in shape.split("x")], n[1:], {"gated": "gate", "ungated": "none"}[gate]


def in_order(case: str) -> tuple[object, ...]:
    """Return a key that sorts cases: few heads first, batches before one sequence, then N."""
    (B, T, *heads), n, gate = sizes(case)
    return heads, T, B, int(n), gate == "gate"


def of_group(rows: Rows, group: str) -> list[str]:
    """Return the names of a group's cases."""
    return [c for c, variant in rows if variant == "householder" and c.startswith(group + "-")]


def delta_product_table() -> str:
    """Forward and forward + backward at the sizes of the table."""
    rows = read("delta-product-gpu.csv", "delta-product-gpu-flashqla.csv")
    lines = []
    for case in sorted(of_group(rows, "table"), key=in_order):
        ours, fla = rows[case, "householder"], rows.get((case, "fla"))
        flashqla = rows.get((case, "FlashQLA"))
        (B, T, H, D), n, gate = sizes(case)
        lines.append(
            [
                f"{B}, {T}, {H}, {D}",
                f"{n}, {gate}",
                f"**{figures(ours, 'forward_ms', 'both_ms')}**",
                figures(ours, "called_forward_ms", "called_both_ms"),
                figures(fla, "forward_ms", "both_ms"),
                figures(flashqla, "called_forward_ms", "called_both_ms"),
                figures(ours, "floor_forward_ms", "floor_both_ms"),
                ", ".join(row["peak_mib"] or "–" for row in (ours, fla, flashqla) if row),
            ]
        )
    return markdown(
        "B, T, H, K = V | N, gate | householder | as called | fla | FlashQLA | floor | peak MiB",
        lines,
    )


def step_table() -> str:
    """One token, in microseconds."""
    rows = read("delta-product-gpu.csv")
    lines = []
    for case in sorted(of_group(rows, "step"), key=in_order):
        (B, *_), n, _ = sizes(case)
        found = [rows[case, "householder"], rows.get((case, "fla"))]
        times = [
            three_digits(row["forward_ms"], 1e3) if row and row["forward_ms"] else "–"
            for row in found
        ]
        floor = three_digits(rows[case, "householder"]["floor_forward_ms"], 1e3)
        lines.append([str(B), n, f"**{times[0]}**", times[1], floor])
    return markdown("B | N | householder, µs | fla, µs | state read and written once", lines)


def first_call_table() -> str:
    """Seconds of the first calls of each configuration."""
    rows = read("delta-product-gpu.csv")
    newest: dict[tuple[str, ...], dict[str, str]] = {}
    # Those that had processors to spare come last, and stay.
    in_turn = sorted(rows.items(), key=lambda item: item[0][0].startswith("first-"))
    for (case, variant), row in in_turn:
        if variant != "householder" or not row["first_backward_s"]:
            continue
        (_, T, _, D), n, gate = sizes(case)
        dtype = case.split("-")[4] if case.count("-") > 3 else "bf16"
        newest[dtype, str(D), n, gate, "yes" if T > 4096 else "no"] = row
    lines = [
        [*key, figures(row, "first_forward_s", "first_backward_s")]
        for key, row in sorted(newest.items(), key=lambda item: (int(item[0][1]), item[0]))
    ]
    return markdown("dtype | K = V | N | gate | in segments | forward / backward, s", lines)


def path_attention_table() -> str:
    """Forward and forward + backward at the sizes of the table, and of the longest sequence."""
    rows = read("path-attention-gpu.csv")
    longest = max(of_group(rows, "length"), key=path_sizes)
    lines = []
    for case in [*sorted(of_group(rows, "table"), key=path_sizes), longest]:
        ours = rows[case, "householder"]
        peers = [rows.get((case, name)) for name in ("sdpa", "fla")]
        B, T, H, D = path_sizes(case)[1]
        lines.append(
            [
                f"{B}, {T}, {H}, {D}",
                f"**{path_figures(ours, 'ms')}**",
                path_figures(ours, "called"),
                *(path_figures(row, "ms") for row in peers),
                figures(ours, "floor_forward_ms", "floor_both_ms"),
                ", ".join(row["both_peak_mib"] or "–" for row in (ours, *peers) if row),
            ]
        )
    return markdown(
        "B, T, H, K = V | householder | as called | SDPA | fla | floor | peak MiB", lines
    )


def path_sizes(case: str) -> tuple[int, list[int]]:
    """Return T and then B, T, H and D of a case."""
    sizes = [int(x) for x in case.split("-")[1].split("x")]
    return sizes[1], sizes


def path_figures(row: dict[str, str] | None, kind: str) -> str:
    """Return forward / both of a row, with the reason for what it lacks."""
    if row is None:
        return "–"
    columns = ("forward_ms", "both_ms") if kind == "ms" else ("called_forward_ms", "called_both_ms")
    why = {"out of memory": "out of memory", "": "–"}.get(row["note"], "–")
    return " / ".join(three_digits(row[x]) if row[x] else why for x in columns)


MIXERS = {
    "gated_delta_net": "Gated DeltaNet",
    "gated_delta_product": "Gated DeltaProduct, N = 2",
    "delta_net": "DeltaNet",
    "delta_product": "DeltaProduct, N = 2",
}
VARIANTS = {"householder-compiled": "householder", "householder": "householder, not compiled"}


def language_model(case: str) -> str:
    """Return the model and the precision that a case's name tells."""
    mixer, *others = case.split("-340m-")[1].split("-")
    return ", ".join([MIXERS[mixer], *(x for x in others if x in ("autocast", "bfloat16"))])


def training_table() -> str:
    """Training steps of language models."""
    rows = read("language-model-gpu.csv")
    lines = []
    for (case, variant), row in sorted(rows.items(), key=lambda item: item[0][0]):
        if not row["tokens_per_second"]:
            continue
        peer = rows.get((case, "fla"))
        ratio = "–"
        if peer and peer["tokens_per_second"] and variant != "fla":
            ratio = f"{float(row['tokens_per_second']) / float(peer['tokens_per_second']):.2f}"
        name = VARIANTS.get(variant, variant)
        speed = f"{int(row['tokens_per_second']):,}"
        bold = f"**{speed}**" if variant == "householder-compiled" else speed
        lines.append(
            [
                language_model(case),
                name,
                bold,
                ratio,
                row["step_ms"],
                row["peak_gib"],
                row["commit"],
            ]
        )
    return markdown(
        "model | code | tokens per second | of fla's | step, ms | peak GiB | commit", lines
    )


def breakdown_table() -> str:
    """Where the time of training steps goes."""
    rows = read("language-model-breakdown-gpu.csv")
    kinds = [
        name for name in next(iter(rows.values())) if name not in ("case", "variant", "commit")
    ]
    lines = [
        [language_model(case), VARIANTS.get(variant, variant), *(row[kind] for kind in kinds)]
        for (case, variant), row in sorted(rows.items(), key=lambda item: item[0][0])
    ]
    return markdown(f"model | code | {' | '.join(kinds)}", lines)


def writing_table() -> str:
    """Tokens written per second, by batch size."""
    rows = read("language-model-decoding-gpu.csv")
    batches = sorted({int(case.rsplit("-", 1)[1]) for case, _ in rows})
    lines = []
    for batch in batches:
        case = next(case for case, _ in rows if case.endswith(f"-batch-{batch}"))
        ours, peer = (rows.get((case, name)) for name in ("householder", "fla"))
        ratio = "–"
        if ours and peer and peer["tokens_per_second"]:
            ratio = f"{float(ours['tokens_per_second']) / float(peer['tokens_per_second']):.1f}"
        cells = [
            f"{int(row['tokens_per_second']):,} ({row['ms_per_token']} ms)"
            if row and row["tokens_per_second"]
            else "–"
            for row in (ours, peer)
        ]
        lines.append([str(batch), f"**{cells[0]}**", cells[1], ratio])
    return markdown("batch | householder, tokens per second (ms per token) | fla | ratio", lines)


TABLES: dict[str, Callable[[], str]] = {
    "path-attention-gpu": path_attention_table,
    "delta-product-gpu": delta_product_table,
    "delta-product-gpu-step": step_table,
    "delta-product-gpu-first-call": first_call_table,
    "language-model-training": training_table,
    "language-model-breakdown": breakdown_table,
    "language-model-writing": writing_table,
}


def rewritten(page: str) -> str:
    """Return the page with every table made again."""
    unknown = {name for _, name, _ in TABLE.findall(page)} ^ set(TABLES)
    if unknown:
        raise SystemExit(f"{PAGE.name} and TABLES differ in {sorted(unknown)}")
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
