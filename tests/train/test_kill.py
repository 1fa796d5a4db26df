"""Real processes, really killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from householder.train.metrics import read_metrics
from householder.train.settings import to_toml

from .conftest import TINY, assert_same_run, results

# Two runs, long enough that a random moment falls into training, evaluating or saving.
SETTINGS = {
    **TINY,
    "num_householder": [1, 2],
    "steps": 100,
    "checkpoint_interval": 7,
    "eval_interval": 50,
}


def command(folder: Path, *options: str) -> list[str]:
    config = folder.parent / "settings.toml"
    config.write_text(to_toml(SETTINGS))
    words = ["train", "--config", str(config), "--out", str(folder), *options]
    return [sys.executable, "-m", "householder", *words]


def run(folder: Path, *options: str) -> None:
    subprocess.run(command(folder, *options), check=True, capture_output=True, timeout=120)


def start_and_signal(folder: Path, signum: int, step: int, options: list[str]) -> subprocess.Popen:
    """Start a run, wait until it has come past a step of either run, and send it a signal."""
    process = subprocess.Popen(
        command(folder, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        done = sum(
            max((r["step"] for r in read_metrics(folder / name / "metrics.jsonl")), default=0)
            for name in ("s3-N1", "s3-N2")
        )
        if done > step:
            time.sleep(random.uniform(0, 0.05))
            os.kill(process.pid, signum)
            break
        time.sleep(0.002)
    process.wait(timeout=60)
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(folder)
    return folder


def assert_same_results(folder: Path, whole: Path) -> None:
    for name in ("s3-N1", "s3-N2"):
        assert_same_run(folder / name, whole / name)
    assert results(folder) == results(whole)
    assert (folder / "accuracy.csv").read_bytes() == (whole / "accuracy.csv").read_bytes()
    # What a kill left half written is gone.
    assert not [p for p in folder.rglob(".*") if "step" in p.name]


def test_killed_twice_and_resumed_ends_with_the_same_bits(tmp_path, whole):
    random.seed()  # another moment every time
    folder = tmp_path / "out"
    for options, step in (([], random.randrange(100)), (["--resume"], random.randrange(100, 150))):
        process = start_and_signal(folder, signal.SIGKILL, step, options)
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        process.communicate()
    run(folder, "--resume")
    assert_same_results(folder, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_says_so(tmp_path, whole, signum):
    folder = tmp_path / "out"
    process = start_and_signal(folder, signum, 60, [])
    _, stderr = process.communicate()
    assert process.returncode == 128 + signum
    assert f"{signal.Signals(signum).name} at step" in stderr
    assert "continue with --resume" in stderr
    assert "Traceback" not in stderr
    run(folder, "--resume")
    assert_same_results(folder, whole)
