"""What holds for every test: fixed seeds, no window, and GPU tests that skip without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports matplotlib: pictures are drawn to files.
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

# The time of one example says nothing on a busy machine. Derandomized, so that a run can be
# repeated: a failure is the code's, and shows again.
settings.register_profile("householder", deadline=None, derandomize=True, database=None)
settings.load_profile("householder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_recordings() -> None:
    """Let no test repeat the launches of another one, which may have changed what is launched."""
    recording = sys.modules.get("householder.ops._recording")
    if recording is not None:
        recording.forget_recordings()


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str], Any]:
    """Run a test file as a script under Triton's interpreter; return the JSON that it prints last.

    Whether kernels are interpreted is settled when they are imported: it takes another process.
    """

    def run(file: str) -> Any:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, file], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Collect the names of the threads that compile kernels, with nothing compiled before."""
    import triton

    threads = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        threads.append(threading.current_thread().name)
        assert not cache_hit, src.name

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    return threads
