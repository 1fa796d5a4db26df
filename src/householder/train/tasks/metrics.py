"""What the publications of the tasks report: accuracies of predicted classes against labels.

All take `predictions`, int64 `[B, L]` classes, and `labels`, int64 `[B, L]` with `IGNORE_INDEX`
where a position is not supervised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from householder.train.tasks.base import IGNORE_INDEX, Task


def token_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Return the fraction of supervised positions that are right.

    Examples:
        >>> labels = torch.tensor([[-100, 1, 2, 3], [-100, 1, 1, 1]])
        >>> token_accuracy(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]]), labels)  # 4 of 6
        0.6666666666666666
    """
    right, supervised = _right(predictions, labels)
    return right.sum().item() / supervised.sum().item()


def position_accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return, for each position, the fraction of its supervised labels that are right.

    Returns:
        float64 `[L]`; NaN at positions supervised in no sequence.

    Examples:
        >>> labels = torch.tensor([[-100, 1, 2, 3], [-100, 1, 1, 1]])
        >>> position_accuracy(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]]), labels).tolist()
        [nan, 1.0, 0.5, 0.5]
    """
    right, supervised = _right(predictions, labels)
    return right.sum(0).double() / supervised.sum(0)


def prefix_accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return, for each position t, the fraction of sequences with no error up to t.

    This is the published metric of word problems, "sequence accuracy" at length t: one wrong answer
    spoils a sequence from there on, so the curve never rises. Where nothing has been supervised yet
    (BOS) it is 1.

    Returns:
        float64 `[L]`; the last entry is the whole-sequence accuracy.

    Examples:
        >>> labels = torch.tensor([[-100, 1, 2, 3], [-100, 1, 1, 1]])
        >>> prefix_accuracy(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]]), labels).tolist()
        [1.0, 1.0, 0.5, 0.0]
    """
    right, supervised = _right(predictions, labels)
    return (right | ~supervised).cummin(dim=1).values.double().mean(0)


def sequence_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Return the fraction of sequences in which every supervised position is right."""
    right, supervised = _right(predictions, labels)
    return (right | ~supervised).all(dim=1).double().mean().item()


def final_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Return the fraction of sequences whose last supervised position is right.

    Raises:
        ValueError: a sequence has no supervised position.

    Examples:
        >>> labels = torch.tensor([[-100, 1, 2, 3], [-100, 1, 1, -100]])
        >>> final_accuracy(torch.tensor([[0, 1, 2, 0], [0, 0, 1, 1]]), labels)
        0.5
    """
    right, supervised = _right(predictions, labels)
    if not supervised.any(dim=1).all():
        raise ValueError(
            "final_accuracy: every sequence must have a supervised position, got "
            f"{int((~supervised.any(dim=1)).sum())} without; drop those sequences"
        )
    positions = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(supervised, positions, -1).argmax(dim=1, keepdim=True)
    return right.gather(1, last).double().mean().item()


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """Rescale an accuracy so that guessing scores 0 and perfection 1: (acc − r) / (1 − r).

    Args:
        accuracy: between 0 and 1.
        chance: r, the accuracy of a uniform guess (`Task.chance`). A constant answer can score
            above 0 where the answers are not uniform, as in modular arithmetic with products.

    Raises:
        ValueError: `chance` is not in [0, 1).

    Examples:
        >>> scaled_accuracy(0.75, 0.5), scaled_accuracy(0.5, 0.5)
        (0.5, 0.0)
    """
    if not 0 <= chance < 1:
        raise ValueError(
            f"scaled_accuracy: `chance` must be in [0, 1), got {chance}; pass the task's `chance`"
        )
    return (accuracy - chance) / (1 - chance)


def score(task: Task, predictions: Tensor, labels: Tensor) -> float:
    """Return the one number that a task's publication reports, by `task.metric`.

    For "prefix" the whole-sequence accuracy, for "final" the scaled accuracy of the answer, for
    "token" the accuracy over all supervised positions.
    """
    if task.metric == "prefix":
        return sequence_accuracy(predictions, labels)
    if task.metric == "final":
        return scaled_accuracy(final_accuracy(predictions, labels), task.chance)
    return token_accuracy(predictions, labels)


def _right(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks `[B, L]`: supervised and right, supervised."""
    if labels.dim() != 2 or predictions.shape != labels.shape or predictions.is_floating_point():
        raise ValueError(
            "metrics: `predictions` must be classes [B, L] like `labels`, got "
            f"{predictions.dtype} {list(predictions.shape)} for labels {list(labels.shape)}; "
            "take the argmax of logits over their last dimension"
        )
    supervised = labels != IGNORE_INDEX
    if not supervised.any():
        raise ValueError(
            f"metrics: at least one label must be supervised, got {list(labels.shape)} labels all "
            f"{IGNORE_INDEX}; check the task that made them"
        )
    return (predictions == labels) & supervised, supervised
