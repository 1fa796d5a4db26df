"""The examples of weights and activations run, and what they promise holds from the first steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lipschitz_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("lipschitz_classifier")
    results = example.main(steps=40, radius=0.1)
    assert set(results) == {"ReLU", "MaxMin", "Householder"}
    for result in results.values():
        assert 0 < result["slope"] <= 1 + 1e-4
        assert 0.6 < result["accuracy"] <= 1
        assert result["certified"] <= result["accuracy"]
    # More is certified where no gradient is lost.
    assert results["MaxMin"]["certified"] > results["ReLU"]["certified"]
    assert capsys.readouterr().out.count("accuracy") == 3


def test_low_rank_layers(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("low_rank_layers")
    example.WIDTH = 64
    results = example.main(steps=40, ranks=(64, 2))
    (whole, _), (before, after) = results[64], results[2]
    assert (
        f"full rank: error {whole:.4f}" in capsys.readouterr().out
    )  # nothing is lost at full rank
    assert whole < before
    assert after < before
    linear = nn.Sequential(nn.Linear(64, 64))
    assert torch.linalg.matrix_rank(example.compress(linear, 2)[0].weight) == 2
