"""Checkpoints made by flash-linear-attention are the same functions as ours, run beside theirs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fla_checkpoints.py"
ROWS = {"delta_net": 14, "gated_deltanet": 10, "gated_deltaproduct": 10, "path_attn": 10}


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention")
@pytest.mark.parametrize("kind", ROWS)
def test_logits_and_greedy_continuations_are_theirs(kind, tmp_path):
    # In a process of its own: it changes how Triton tunes kernels and switches torch.compile off.
    done = subprocess.run(
        [sys.executable, SCRIPT, kind, "--results", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{ROWS[kind]} rows, 0 wrong" in done.stdout
