"""The benchmarks' own code that needs no GPU: what is measured where, and the pages' tables."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_tables_of_the_documentation_are_made_from_the_rows():
    tables = importlib.import_module("tables")
    pages = [page.read_text() for page in tables.PAGES]
    assert [tables.rewritten(page) for page in pages] == pages, "run python benchmarks/tables.py"
    shown = {name for page in pages for _, name, _ in tables.TABLE.findall(page)}
    assert shown == set(tables.TABLES)
    with pytest.raises(SystemExit, match="nothing"):
        tables.rewritten("<!-- table: nothing -->\n<!-- end -->")


# The scripts that append to a file of rows, and the package that they cannot be imported without.
FILES = {
    "delta-product-gpu.csv": ("gpu", "triton"),
    "path-attention-gpu.csv": ("path_gpu", "triton"),
    "product-gpu.csv": ("product_gpu", "triton"),
    "layers-gpu.csv": ("layers_gpu", "torch"),
    "language-model-gpu.csv": ("lm_gpu", "torch"),
    "language-model-decoding-gpu.csv": ("lm_decode_gpu", "torch"),
    "fla-checkpoints-h200.csv": ("fla_checkpoints", "transformers"),
    "in-transformers.csv": ("in_transformers", "transformers"),
    "apply-cpu.csv": ("run", "transformers"),
    "gated-delta-cpu.csv": ("run", "transformers"),
}


@pytest.mark.parametrize("file", FILES)
def test_rows_can_be_appended_to_the_files_there_are(file, tmp_path):
    script, needed = FILES[file]
    pytest.importorskip(needed)
    columns = importlib.import_module(script).COLUMNS
    recording = importlib.import_module("recording")
    copy = tmp_path / "results" / file
    recording.append(copy, columns, [{columns[1]: "new"}])
    recording.append(copy, columns, [{columns[1]: "newer"}])
    header, *rows = copy.read_text().splitlines()
    there = (BENCHMARKS / "results" / file).read_text().splitlines()[0]
    assert header == there, "rows of these columns would be refused"
    assert [row.split(",")[1] for row in rows] == ["new", "newer"]
    with pytest.raises(SystemExit, match="has other columns than"):
        recording.append(copy, [*columns, "another"], [])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_case_is_in_one_part_and_what_the_peer_chooses_once_is_not_split(count):
    pytest.importorskip("triton")
    gpu = importlib.import_module("gpu")
    chosen = list(gpu.cases())
    parts = [gpu.take_part(chosen, f"{i + 1}/{count}") for i in range(count)]
    assert sorted(case for part in parts for case in part) == sorted(chosen)
    assert len({case.name for case in chosen}) == len(chosen)
    seen = [{gpu.peer_family(case) for case in part} for part in parts]
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_a_case_is_checked_in_its_own_configuration():
    pytest.importorskip("triton")
    gpu_cases = importlib.import_module("gpu_cases")
    for case in gpu_cases.cases():
        short = case.shortened()
        assert short.configuration == case.configuration
        assert short.B * short.T <= 8400


def test_a_peer_is_not_asked_for_calls_that_take_too_long():
    pytest.importorskip("triton")
    path_gpu = importlib.import_module("path_gpu")
    cases = {case.name: case for case in path_gpu.CASES}
    assert len(cases) == len(path_gpu.CASES)
    assert len({case.name for case in path_gpu.FIRST_CASES}) == len(path_gpu.FIRST_CASES)
    guard = path_gpu.Guard(slowest_ms=1000.0)
    short, long = cases["table-1x16384x16x64"], cases["length-1x131072x16x64"]
    guard.check(long, "fla", "both")  # nothing is known yet
    guard.learn(short, "fla", "both", 20.0)
    guard.check(short, "fla", "both")
    guard.check(long, "fla", "forward")
    guard.check(cases["length-1x131072x16x128"], "fla", "both")
    with pytest.raises(path_gpu.TooSlow, match="about 1 s") as raised:  # 64 times the pairs
        guard.check(long, "fla", "both")
    assert path_gpu.refusal(raised.value) == "left out: a call would take about 1 s"
    guard.learn(short, path_gpu.OURS, "both", 20.0)
    guard.check(long, path_gpu.OURS, "both")


@pytest.mark.parametrize("variant", ["householder", "householder-transformers"])
def test_decoding_of_a_small_model_is_measured(variant):
    pytest.importorskip("transformers")
    lm_gpu, decode = (importlib.import_module(name) for name in ("lm_gpu", "lm_decode_gpu"))
    sizes = lm_gpu.Sizes(vocabulary=50, width=16, layers=1, heads=2, mlp_width=16)
    row = decode.measure("gated_delta_net", variant, 2, sizes, device="cpu")
    assert row["tokens_per_second"] > 0


def test_training_of_a_small_model_is_measured():
    lm_gpu = importlib.import_module("lm_gpu")
    sizes = lm_gpu.Sizes(2, 16, 50, 16, 1, 2, 16, steps=1, warmup=1)
    for precision in lm_gpu.PRECISIONS:
        row = lm_gpu.measure("gated_delta_product", "householder", precision, sizes, False, "cpu")
        assert row["tokens_per_second"] > 0
        assert row["loss"] == pytest.approx(3.9, abs=0.2)


def test_kernels_are_counted_by_what_they_do():
    lm_gpu = importlib.import_module("lm_gpu")
    listing = (
        "   20.50 ms on the device\n    9.00    24 nvjet_sm90_tst\n    3.00     8 walk_kernel\n"
    )
    listing += "    2.00     8 triton_poi_fused_mul_silu_8\n    1.50     1 void at::native::add\n"
    parts = lm_gpu.breakdown_of(listing)
    assert parts.pop("all") == 20.5
    assert {kind: ms for kind, ms in parts.items() if ms} == {
        "products": 9.0,
        "recurrence": 3.0,
        "gates": 2.0,
        "elementwise": 1.5,
    }
