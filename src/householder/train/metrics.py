"""Metrics as one JSON object per line, in a file that survives kills and resumes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from householder.storage import write_atomically


class MetricsWriter:
    """Append records to a JSONL file, one line each, flushed as they come.

    Args:
        path: the file.
        after_step: keep only the records up to this step: those that a resumed run will not write
            again. 0 starts an empty file.

    Raises:
        OSError: the file cannot be written.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsWriter(path) as metrics:
        ...     metrics.write({"step": 10, "loss": 1.5})
        >>> read_metrics(path)
        [{'step': 10, 'loss': 1.5}]
    """

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        kept = [r for r in read_metrics(path) if r["step"] <= after_step] if after_step else []
        write_atomically(path, "".join(_line(record) for record in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must have a `step`, and its numbers must be finite."""
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Flush to the disk, so that a checkpoint never knows of more steps than the metrics do."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics file.

    A last line without its newline was cut short by a kill and is left out.

    Args:
        path: the file; one that does not exist has no records.

    Returns:
        The records in the order written.
    """
    if not path.exists():
        return []
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


def _line(record: dict[str, Any]) -> str:
    # Seven significant digits hold a float32; more would be noise in the file.
    rounded = {
        k: float(f"{v:.7g}") if isinstance(v, float) and math.isfinite(v) else v
        for k, v in record.items()
    }
    return json.dumps(rounded, allow_nan=False) + "\n"
