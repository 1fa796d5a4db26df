"""What every synthetic task is: a seeded generator of token sequences with labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that is not supervised; `torch.nn.functional.cross_entropy` skips it."""

Metric = Literal["prefix", "final", "token"]


class Batch(NamedTuple):
    """Hold token sequences with the label of each position.

    Attributes:
        tokens: int64 `[B, L]`, each from 0 to `vocab_size − 1`.
        labels: int64 `[B, L]`, the class wanted at each position, from 0 to `num_classes − 1`, or
            `IGNORE_INDEX` where the position is not supervised. Labels are not shifted: the label
            of position t is what a model should say after reading tokens 0 … t.
    """

    tokens: Tensor
    labels: Tensor


class Task(ABC):
    """Generate sequences of one synthetic task.

    A subclass sets the attributes and writes `_generate`.

    Attributes:
        name: the name that `make_task` knows it by.
        vocab_size: number of different tokens.
        num_classes: number of different labels.
        metric: what its publication reports: "prefix" (fraction of sequences whose whole prefix is
            right, per length), "final" (accuracy of the one answer) or "token" (accuracy over all
            supervised positions).
        chance: accuracy of guessing uniformly among the possible answers, the r of
            `householder.train.tasks.metrics.scaled_accuracy`.
        min_length: the smallest `length` that `sample` takes.
        num_supervised: how many positions of every sequence are supervised, where they are few;
            training then makes the logits of these alone. `None` elsewhere.
    """

    name: str
    vocab_size: int
    num_classes: int
    metric: Metric
    chance: float
    min_length: int = 1
    num_supervised: int | None = None

    def sample(self, num: int, length: int, generator: torch.Generator) -> Batch:
        """Draw sequences, on the generator's device.

        Args:
            num: number of sequences, B.
            length: length of each in the sense of the task's publication (each task says how L, the
                number of columns, follows from it).
            generator: source of all randomness; the same state gives the same batch.

        Returns:
            A `Batch` of `[B, L]` tokens and labels.

        Raises:
            ValueError: `num` < 1, or `length` below `min_length` or not one the task can make.
            TypeError: `generator` is not a `torch.Generator`.
        """
        if num < 1:
            raise ValueError(
                f"{self.name}: `num` must be at least 1, got {num}; ask for a sequence or more"
            )
        if length < self.min_length:
            raise ValueError(
                f"{self.name}: `length` must be at least {self.min_length}, got {length}; "
                "ask for longer sequences"
            )
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{self.name}: `generator` must be a torch.Generator, got "
                f"{type(generator).__name__}; pass torch.Generator().manual_seed(seed)"
            )
        return self._generate(num, length, generator)

    @abstractmethod
    def _generate(self, num: int, length: int, generator: torch.Generator) -> Batch:
        """Draw a batch; the arguments are already checked."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, vocab_size={self.vocab_size}, "
            f"num_classes={self.num_classes}, metric={self.metric!r})"
        )
