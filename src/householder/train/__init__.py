"""Train models on seeded tasks: settings, loop, checkpoints, evaluation and pictures."""

from householder.train.comparison import Comparison, run_comparison
from householder.train.config import TrainConfig
from householder.train.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    NonFiniteError,
    OutputError,
    RunError,
)
from householder.train.evaluation import Evaluation, evaluate
from householder.train.loop import TrainResult, train

__all__ = [
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "Evaluation",
    "Interrupted",
    "NonFiniteError",
    "OutputError",
    "RunError",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "run_comparison",
    "train",
]
