"""Write the tables of docs/benchmarks.md and of README.md from the rows of `results/`.

    python benchmarks/tables.py

A table stands between `<!-- table: name -->` and `<!-- end -->`; the newest row of a case counts.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from recording import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
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


def path_first_call_table() -> str:
    """Seconds of the first calls of each configuration of `path_attention`."""
    rows = read("path-attention-gpu.csv")
    newest: dict[tuple[int, str, str, str], dict[str, str]] = {}
    for case in of_group(rows, "first"):
        D = path_sizes(case)[1][3]
        _, _, dtype, *kinds = [*case.split("-"), *["bf16"] * (case.count("-") < 2)]
        reflectors = "fp32" if "wide" in kinds else dtype
        newest[D, dtype, reflectors, "yes" if "gated" in kinds else "no"] = rows[
            case, "householder"
        ]
    lines = [
        [str(D), dtype, reflectors, gates, figures(row, "first_forward_s", "first_backward_s")]
        for (D, dtype, reflectors, gates), row in sorted(newest.items())
    ]
    return markdown("K = V | dtype | reflectors | gates | forward / backward, s", lines)


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


def decoding_times() -> dict[tuple[int, int, int], dict[str, float]]:
    """Return the newest µs of every variant, by N, B and T."""
    newest: dict[tuple[int, int, int], dict[str, float]] = {}
    with (RESULTS / "decoding-gpu.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            N, B, T = (int(row[name]) for name in ("N", "B", "T"))
            newest.setdefault((N, B, T), {})[row["variant"]] = float(row["us"])
    return newest


def decoding_table() -> str:
    """New tokens of a cache: ours, plain attention that puts them into its cache, and it alone."""
    names = ("householder", "torch SDPA, cached", "torch SDPA")
    lines = []
    for (N, B, T), us in sorted(decoding_times().items()):
        times = [f"{us[x]:,.{us[x] < 100:d}f}" if x in us else "–" for x in names]
        ratios = [f"{us[names[0]] / us[x]:.2f}" if x in us else "–" for x in names]
        cells = [f"**{times[0]}**", times[1], ratios[1], times[2], ratios[2]]
        lines.append([str(N), str(B), f"{T:,}", *cells])
    return markdown(
        "N | B | T | path_attention, µs | SDPA, cached | ratio | SDPA alone | ratio", lines
    )


MIXERS = {
    "gated_delta_net": "Gated DeltaNet",
    "gated_delta_product": "Gated DeltaProduct, N = 2",
    "delta_net": "DeltaNet",
    "delta_product": "DeltaProduct, N = 2",
}
VARIANTS = {
    "householder-compiled": "householder",
    "householder": "householder, not compiled",
    "householder-keeping-compiled": "householder, nothing made anew",
    "fla": "fla",
    "fla-tf32": "fla, TF32 allowed",
}


def language_model(case: str) -> str:
    """Return the model and the precision that a case's name tells."""
    mixer, *others = case.split("-340m-")[1].split("-")
    return ", ".join([MIXERS[mixer], *(x for x in others if x in ("autocast", "bfloat16"))])


def training_table() -> str:
    """Training steps of language models."""
    rows = read("language-model-gpu.csv")
    lines = []
    order = list(VARIANTS)
    for case, variant in sorted(rows, key=lambda key: (key[0], order.index(key[1]))):
        row = rows[case, variant]
        if not row["tokens_per_second"]:
            continue
        peer = rows.get((case, "fla"))
        ratio = "–"
        if peer and peer["tokens_per_second"] and variant != "fla":
            ratio = f"{float(row['tokens_per_second']) / float(peer['tokens_per_second']):.2f}"
        name = VARIANTS[variant]
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


# Of README: what is computed, the rows' file and case, and the peer with its name there.
README_CPU = (
    (
        "Q X, D = 512, N = 512, 32 columns",
        *("apply-cpu.csv", "apply-512x512", "torch.linalg.householder_product"),
        "`torch.linalg.householder_product`",
    ),
    *(
        (
            f"D = {D}, N = {N}",
            "apply-cpu.csv",
            f"apply-{D}x{N}",
            "torch.linalg.householder_product",
            "",
        )
        for D, N in ((1024, 64), (2048, 32))
    ),
    *(
        (
            f"{what}{', '.join(size.split('x'))}",
            *(
                "gated-delta-cpu.csv",
                f"gated-delta-{size}-float32",
                "transformers qwen3_next, chunked",
            ),
            name,
        )
        for what, size, name in (
            (
                "gated delta rule, B, T, H, K = V: ",
                "1x2048x8x64",
                "`transformers` (qwen3_next, chunked)",
            ),
            ("", "4x512x8x64", ""),
            ("", "1x2048x8x128", ""),
        )
    ),
)
_FLA, _SDPA = ("fla", "fla"), ("sdpa", "SDPA, without positions")
README_GPU = (
    (
        "`delta_product`, bfloat16, B, T, H, K = V: 8, 4096, 16, 128, N = 1",
        *("delta-product-gpu.csv", "table-8x4096x16x128-n1-ungated", _FLA),
    ),
    ("the same, forget gates", "delta-product-gpu.csv", "table-8x4096x16x128-n1-gated", _FLA),
    ("N = 2", "delta-product-gpu.csv", "table-8x4096x16x128-n2-ungated", _FLA),
    ("N = 4", "delta-product-gpu.csv", "table-8x4096x16x128-n4-ungated", _FLA),
    ("1, 32768, 16, 128, N = 1", "delta-product-gpu.csv", "table-1x32768x16x128-n1-ungated", _FLA),
    (
        "`path_attention`, bfloat16, 4, 4096, 16, 64",
        *("path-attention-gpu.csv", "table-4x4096x16x64", _FLA, _SDPA),
    ),
    ("4, 4096, 16, 128", "path-attention-gpu.csv", "table-4x4096x16x128", _FLA, _SDPA),
    ("1, 131072, 16, 128", "path-attention-gpu.csv", "length-1x131072x16x128", _FLA, _SDPA),
    (
        "Q of 1024 reflectors in 1024 dimensions, float32",
        *("product-gpu.csv", "frame-n1024-r1024", ("torch", "`torch.linalg.householder_product`")),
    ),
    (
        "frozen 4096 × 4096 layer, 32 trainable reflectors, 8192 tokens, bfloat16",
        *(
            "product-gpu.csv",
            "adapted-n4096-r32",
            ("peft", "peft's HRA"),
            ("frozen", "frozen alone"),
        ),
    ),
)


def readme_cpu_table() -> str:
    """Forward + backward on a CPU."""
    lines = []
    for what, file, case, variant, name in README_CPU:
        rows = read(file)
        found = [rows[case, "householder"], rows[case, variant]]
        ours, peer = (float(row["median_ms"]) for row in found)
        cells = [f"{three_digits(row['median_ms'])} ms" for row in found]
        if file.startswith("gated"):
            cells = [
                f"{cell}, {float(row['peak_mib']):.0f} MiB"
                for cell, row in zip(cells, found, strict=True)
            ]
        lines.append([what, cells[0], f"{name} {cells[1]}".strip(), f"{peer / ours:.2g}"])
    return markdown("| householder | peer | ratio", lines)


def readme_gpu_table() -> str:
    """Forward and forward + backward on a GPU, with the peak of memory of the latter."""
    lines = []
    for what, file, case, *peers in README_GPU:
        rows = read(file)
        others = "; ".join(f"{name} {readme_figures(rows[case, v])}" for v, name in peers)
        ours = rows[case, "householder"]
        lines.append([what, readme_figures(ours), others])
    us = decoding_times()[1, 1, 4096]
    what = "a decoded token of `path_attention` after 4,096, 16 heads of 128"
    cached, alone = us["torch SDPA, cached"], us["torch SDPA"]
    beside = f"SDPA and putting k and v into its cache {cached:.1f} µs, SDPA alone {alone:.1f}"
    lines.append([what, f"{us['householder']:.1f} µs", beside])
    return markdown("| householder | peers", lines)


def readme_figures(row: dict[str, str]) -> str:
    """Return forward / both in ms and the peak of memory, or why there are none."""
    if row.get("note", "").startswith("refuses"):
        return "refuses the gradient with this Triton"
    times = path_figures(row, "ms") if "note" in row else figures(row, "forward_ms", "both_ms")
    mib = row.get("peak_mib") or row.get("both_peak_mib")
    if not mib:
        return times
    return f"{times}, {f'{float(mib) / 1024:.1f} GiB' if float(mib) > 4096 else f'{mib} MiB'}"


def readme_language_model_table() -> str:
    """Training and writing of 340M models."""
    training, writing = read("language-model-gpu.csv"), read("language-model-decoding-gpu.csv")
    lines = []
    for mixer in ("gated_delta_net", "gated_delta_product"):
        case = f"train-340m-{mixer}-8x4096-bfloat16"
        found = [training[case, variant] for variant in ("householder-compiled", "fla")]
        cells = [
            f"{rounded(r['tokens_per_second'])}, {float(r['peak_gib']):.0f} GiB" for r in found
        ]
        if with_tf32 := training.get((case, "fla-tf32")):
            cells[1] += f"; {rounded(with_tf32['tokens_per_second'])} with TF32 allowed"
        lines.append([f"training steps, {MIXERS[mixer]}", *cells])
    for batch in (1, 256):
        case = f"decode-340m-gated_delta_net-batch-{batch}"
        ours, fla = (rounded(writing[case, v]["tokens_per_second"]) for v in ("householder", "fla"))
        lines.append([f"writing, Gated DeltaNet, batch {batch}", ours, fla])
    return markdown("tokens per second, and peak of memory | householder | fla", lines)


def rounded(number: str) -> str:
    """Return a count with three digits and separators."""
    return f"{float(f'{float(number):.3g}'):,.0f}"


TABLES: dict[str, Callable[[], str]] = {
    "path-attention-gpu": path_attention_table,
    "path-attention-gpu-first-call": path_first_call_table,
    "path-attention-decoding": decoding_table,
    "delta-product-gpu": delta_product_table,
    "delta-product-gpu-step": step_table,
    "delta-product-gpu-first-call": first_call_table,
    "language-model-training": training_table,
    "language-model-breakdown": breakdown_table,
    "language-model-writing": writing_table,
    "readme-cpu": readme_cpu_table,
    "readme-gpu": readme_gpu_table,
    "readme-language-models": readme_language_model_table,
}


def rewritten(page: str) -> str:
    """Return the page with every table made again."""
    unknown = {name for _, name, _ in TABLE.findall(page)} - set(TABLES)
    if unknown:
        raise SystemExit(f"a page asks for tables that TABLES has not: {sorted(unknown)}")
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text()))
