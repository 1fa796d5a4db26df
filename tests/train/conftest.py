"""A model small enough to train in a moment, and what a run leaves behind."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from householder.train import Interrupted, TrainConfig, checkpoint, train
from householder.train.interrupt import StopRequest
from householder.train.metrics import read_metrics
from householder.train.observer import Observer

TINY: dict[str, Any] = {
    "task": "s3",
    "length": 6,
    "eval_length": 12,
    "d_model": 8,
    "num_heads": 2,
    "mlp_width": 8,
    "num_householder": 2,
    "steps": 12,
    "batch_size": 4,
    "warmup": 2,
    "eval_samples": 8,
    "log_interval": 3,
    "checkpoint_interval": 4,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture
def tiny():
    """Settings of a tiny run, some of them replaced."""

    def make(**settings: Any) -> TrainConfig:
        return TrainConfig(**{**TINY, **settings})

    return make


class StopAt(Observer):
    """Send a signal's request at a step."""

    def __init__(self, step):
        self.step, self.request = step, StopRequest()

    def stepped(self, config, step):
        if step == self.step:
            self.request.signum = signal.SIGTERM


def interrupt(config, folder, step, **options):
    observer = StopAt(step)
    with pytest.raises(Interrupted, match=f"SIGTERM at step {step}; saved"):
        train(config, folder, observer=observer, stop=observer.request, **options)


def final_state(folder: Path) -> tuple[dict, dict, dict]:
    """Return model, optimizer and other state of the newest checkpoint, without timings."""
    path = checkpoint.latest(folder / "checkpoints")
    assert path is not None
    loaded = checkpoint.load(path)
    state = {k: v for k, v in loaded.state.items() if k != "seconds"}
    return loaded.model, loaded.optimizer, {"step": loaded.step, **state}


def timeless_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics without what depends on the speed of the machine."""
    timings = ("seconds", "tokens_per_second")
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in timings} for r in records]


def assert_same_run(folder: Path, other: Path) -> None:
    """Assert that two runs ended with the same bits and wrote the same metrics."""
    for ours, theirs in zip(final_state(folder), final_state(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, theirs[name]), name
            elif name != "config":
                assert value == theirs[name], name
    assert timeless_metrics(folder) == timeless_metrics(other)
    assert timeless_metrics(folder), "a run without metrics proves nothing"


def results(folder: Path) -> list[dict[str, Any]]:
    """Return `results.json` without timings."""
    runs = json.loads((folder / "results.json").read_text())
    return [{k: v for k, v in run.items() if k != "seconds"} for run in runs]
