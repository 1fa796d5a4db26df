"""Evaluation: accuracy as a function of length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from householder.train.config import TrainConfig
from householder.train.data import generator_for
from householder.train.tasks import IGNORE_INDEX, Batch, Task, make_task
from householder.train.tasks.metrics import (
    final_accuracy,
    prefix_accuracy,
    sequence_accuracy,
    token_accuracy,
)

METRIC_NAMES = {
    "prefix": "whole-prefix accuracy",
    "final": "accuracy of the answer",
    "token": "token accuracy",
}

MIN_TOKENS = 16_384


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on held-out sequences, by length.

    Attributes:
        metric: "prefix", "final" or "token", as in `householder.train.tasks.Task.metric`.
        lengths: the lengths in tokens, rising.
        accuracy: the accuracy at each length, from 0 to 1.
        num_samples: how many sequences were evaluated.
    """

    metric: str
    lengths: tuple[int, ...]
    accuracy: tuple[float, ...]
    num_samples: int

    def at(self, length: int) -> float:
        """Return the accuracy at the longest evaluated length that does not exceed `length`."""
        return max((n, a) for n, a in zip(self.lengths, self.accuracy, strict=True) if n <= length)[
            1
        ]

    def reach(self, level: float) -> int:
        """Return the longest length up to which the accuracy stays at least `level`, or 0."""
        longest = 0
        for length, accuracy in zip(self.lengths, self.accuracy, strict=True):
            if accuracy < level:
                break
            longest = length
        return longest


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a model runs: bfloat16 autocast when the settings ask for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def accuracy(task: Task, predictions: Tensor, labels: Tensor) -> float:
    """Return the accuracy that the task is judged by, from 0 to 1.

    Args:
        task: its `metric` decides: of whole sequences ("prefix"), of the one answer ("final") or of
            all supervised tokens ("token").
        predictions: classes, int64 `[B, L]`.
        labels: int64 `[B, L]`.
    """
    measures = {
        "prefix": sequence_accuracy,
        "final": final_accuracy,
        "token": token_accuracy,
    }
    return measures[task.metric](predictions, labels)


def evaluate(
    model: nn.Module,
    config: TrainConfig,
    device: torch.device,
    *,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure the accuracy of a model on held-out sequences up to `config.eval_length`.

    A task supervised at every position ("prefix") is evaluated once, at the full length: since the
    model is causal, position t of a long sequence is what a sequence of length t would give. The
    others are evaluated at several lengths from `config.length` on.

    Args:
        model: tokens int64 `[B, L]` to logits `[B, L, num_classes]`.
        config: task, lengths, number of samples and seed, which decide the sequences.
        device: where the model is.
        check: called after every batch; may raise to stop.

    Returns:
        The `Evaluation`.
    """
    assert config.eval_length is not None
    task = make_task(config.task)
    if task.metric == "prefix":
        batch, predictions = _predict(model, task, config, config.eval_length, device, check)
        supervised = (batch.labels != IGNORE_INDEX).any(dim=0)
        curve = prefix_accuracy(predictions, batch.labels)[supervised].tolist()
        return Evaluation(
            task.metric, tuple(range(1, len(curve) + 1)), tuple(curve), len(predictions)
        )
    curve, lengths = [], []
    for length in _lengths(task, config):
        batch, predictions = _predict(model, task, config, length, device, check)
        lengths.append(length)
        curve.append(accuracy(task, predictions, batch.labels))
    return Evaluation(task.metric, tuple(lengths), tuple(curve), config.eval_samples)


def _lengths(task: Task, config: TrainConfig) -> list[int]:
    """Return lengths the task can make, four per doubling, from training to evaluation length."""
    assert config.eval_length is not None
    doublings = math.log2(config.eval_length / config.length)
    steps = max(1, math.ceil(4 * doublings))
    found = set()
    for i in range(steps + 1):
        length = round(config.length * 2 ** (doublings * i / steps))
        # Some tasks exist only at odd lengths: the next shorter one stands in.
        found.update([n for n in (length, length - 1) if _can_make(task, n)][:1])
    return sorted(n for n in found if n >= config.length)


def _can_make(task: Task, length: int) -> bool:
    try:
        task.sample(1, length, torch.Generator().manual_seed(0))
    except ValueError:
        return False
    return True


def _predict(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    length: int,
    device: torch.device,
    check: Callable[[], None],
) -> tuple[Batch, Tensor]:
    """Return held-out sequences and the classes predicted for them, both on the CPU."""
    batch = task.sample(config.eval_samples, length, generator_for(config.seed, "held-out", length))
    # Without gradients there is room for more tokens at once than in a small training step.
    rows = max(1, max(config.batch_size * config.length, MIN_TOKENS) // length)
    predictions = []
    with evaluation_mode(model), torch.inference_mode(), autocast(config, device), not_compiled():
        for tokens in batch.tokens.split(rows):
            predictions.append(model(tokens.to(device)).argmax(dim=-1))
            check()
    return batch, torch.cat(predictions).cpu()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def not_compiled() -> AbstractContextManager[object]:
    """Return the context in which compiled blocks run as they are written.

    Other lengths than those of training would be compiled anew, for longer than they run.
    """
    return torch.compiler.set_stance("force_eager")
