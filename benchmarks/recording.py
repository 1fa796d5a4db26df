"""What the benchmark scripts share: where a row was measured, and how it is kept."""

from __future__ import annotations

import argparse
import csv
import datetime
import fcntl
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every script takes: the folder of its rows, and the commit they name."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--commit", default="", help="the measured commit; default: what git says")


def environment(commit: str = "", **others: object) -> dict[str, object]:
    """Return what every row says of where it was measured.

    Args:
        commit: the measured one, where git cannot tell.
        **others: versions of further packages, the processor, ….
    """
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        **others,
        "commit": commit or described_commit(),
    }


def described_commit() -> str:
    """Return what git calls this checkout."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()


def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution, or nothing."""
    found = (d.version for d in metadata.distributions() if d.name == distribution)
    return next(found, "")


def append(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Append rows to a CSV file, which other processes may append to as well.

    Its folder is made when missing; a file of other columns is left alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        header = file.readline().strip()
        if header and header != ",".join(columns):
            raise SystemExit(f"{path} has other columns than {','.join(columns)}; move it away")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not header:
            writer.writeheader()
        writer.writerows(rows)


def peak_memory(run: Callable[[], object]) -> float:
    """Return the MiB that one call takes on the GPU beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
