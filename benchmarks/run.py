"""Check and time the cases of `cases.py`, and append the figures to `results/*.csv`.

    python benchmarks/run.py                # all
    python benchmarks/run.py apply          # the cases whose name or group starts so
    python benchmarks/run.py --threads 1 gated-delta

Every variant is compared with the float64 reference before anything is timed. The variants of a
case take turns, so that a machine that slows down slows all of them. Peak memory is measured in a
process of its own for each variant: what one run adds to the process's resident memory.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch

from cases import CASES, Case
from householder.testing import relative_error
from recording import RESULTS, append, described_commit, installed_version

COLUMNS = (
    "date",
    "case",
    "variant",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "peak_mib",
    "repeats",
    "error",
    "processor",
    "threads",
    "torch",
    "transformers",
    "commit",
)


def main() -> None:
    """Run the chosen cases and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of case names or groups; all if none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    chosen = [
        case
        for case in CASES
        if not arguments.names or case.name.startswith(tuple(arguments.names))
    ]
    if not chosen:
        names = ", ".join(sorted({case.group for case in CASES}))
        parser.error(f"no case starts with {arguments.names}; the groups are {names}")
    torch.set_num_threads(arguments.threads)
    environment = describe_environment(arguments.threads)
    for case in chosen:
        rows = measure(case)
        path = RESULTS / f"{case.group}-cpu.csv"
        append(path, COLUMNS, [row | environment for row in rows])
        for row in rows:
            print(
                f"{case.name:36} {row['variant']:34} {row['median_ms']:9.2f} ms"
                f"  [{row['p20_ms']:.2f}, {row['p80_ms']:.2f}]  {row['peak_mib']:8.1f} MiB"
                f"  error {row['error']:.1e}",
                flush=True,
            )


def measure(case: Case) -> list[dict[str, object]]:
    """Check all variants, then time them in turns."""
    variants = case.variants()
    errors = check(case, variants)
    variants.pop("reference", None)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(case.repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name, values in times.items():
        values = values[1:]  # the first warms up
        p20, _, _, p80 = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
        rows.append(
            {
                "case": case.name,
                "variant": name,
                "median_ms": round(statistics.median(values), 3),
                "p20_ms": round(p20, 3),
                "p80_ms": round(p80, 3),
                "peak_mib": round(peak_memory(case.name, name), 1),
                "repeats": len(values),
                "error": errors[name],
            }
        )
    return rows


def check(case: Case, variants: dict) -> dict[str, float]:
    """Return each variant's largest relative error; raise if one computes something else."""
    if "reference" not in variants:
        return dict.fromkeys(variants, float("nan"))
    expected = variants["reference"]()
    errors = {}
    for name, run in variants.items():
        actual = run()
        errors[name] = max(relative_error(actual[key], expected[key]) for key in expected)
        if not errors[name] <= case.tolerance:
            raise SystemExit(
                f"{case.name}: {name} is off by {errors[name]:.1e}, more than "
                f"{case.tolerance:.0e}; a wrong answer is not timed"
            )
    return errors


def peak_memory(case_name: str, variant: str) -> float:
    """Return the MiB that one run of a variant adds to the memory of a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory_here, (case_name, variant, torch.get_num_threads()))


def _peak_memory_here(case_name: str, variant: str, threads: int) -> float:
    torch.set_num_threads(threads)
    case = next(case for case in CASES if case.name == case_name)
    run = case.variants()[variant]
    torch.ones(64, 64) @ torch.ones(64, 64)  # the libraries' own buffers
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")  # only Linux can forget the peak of what went before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """Return a memory figure of this process, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no field {field}")


def describe_environment(threads: int) -> dict[str, object]:
    """Return what a row says of where it was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor_name(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": installed_version("transformers"),
        "commit": described_commit() or "unknown",
    }


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
