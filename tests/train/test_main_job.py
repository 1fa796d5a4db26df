"""The main job itself: `householder train` without arguments."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_reflections_solve_s3_and_one_does_not(tmp_path):
    words = [sys.executable, "-m", "householder", "train"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    out = tmp_path / "householder-run"
    one, two = json.loads((out / "results.json").read_text())
    assert [run["config"]["num_householder"] for run in (one, two)] == [1, 2]
    for run in (one, two):
        assert run["config"]["length"] == 32
        assert run["config"]["num_layers"] == 1
        assert run["evaluation"]["lengths"] == list(range(1, 129))
    at_32, at_128 = two["evaluation"]["accuracy"][31], two["evaluation"]["accuracy"][127]
    assert at_32 >= 0.99
    assert at_128 >= 0.95
    assert one["evaluation"]["accuracy"][31] <= 0.05
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
