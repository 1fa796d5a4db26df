"""What a training run tells whoever watches it."""

from __future__ import annotations

from typing import Any

from householder.train.config import TrainConfig
from householder.train.evaluation import Evaluation


class Observer:
    """Watch a run; the methods do nothing here and are overridden as needed."""

    def started(self, config: TrainConfig, step: int, num_parameters: int) -> None:
        """Note that a run begins, at a step above 0 when it is resumed."""

    def stepped(self, config: TrainConfig, step: int) -> None:
        """Note that so many steps are done."""

    def logged(self, config: TrainConfig, record: dict[str, Any]) -> None:
        """Note a new line of the metrics."""

    def evaluating(self, config: TrainConfig) -> None:
        """Note that training is over and the final evaluation begins."""

    def finished(self, config: TrainConfig, evaluation: Evaluation) -> None:
        """Note that a run is over, with its final evaluation."""
