"""The loss at every position of sequences that may be longer than those of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from householder.train.errors import ConfigError, Interrupted
from householder.train.evaluation import not_compiled
from householder.train.interrupt import StopRequest
from householder.train.settings import Settings, setting
from householder.train.text.corpus import open_corpus
from householder.train.text.evaluation import spaced_windows, token_losses
from householder.train.text.run import TextResult


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """How the loss by position is measured."""

    eval_length: int = setting(
        32_768, "Evaluate on sequences of so many tokens.", section="Evaluation", at_least=2
    )
    eval_windows: int = setting(
        128,
        "How many of them, half a context apart.",
        section="Evaluation",
        at_least=1,
    )


def held_out_tokens(corpus: Path, evaluation: EvaluationConfig) -> Any:
    """Return the held-out tokens of a corpus.

    Raises:
        ConfigError: they are fewer than a sequence needs.
    """
    tokens = open_corpus(corpus).validation
    needed = evaluation.eval_length + 1
    if len(tokens) < needed:
        raise ConfigError(
            f"`eval_length` needs {needed} held-out tokens, there are {len(tokens)}; give more "
            "text, a larger --validation or a smaller --eval-length"
        )
    return tokens


def losses_by_position(
    result: TextResult, held_out: Any, evaluation: EvaluationConfig, stop: StopRequest
) -> np.ndarray[Any, Any]:
    """Return the mean loss of a trained model at every position, float32 `[eval_length]`.

    Args:
        result: of the training.
        held_out: tokens that it has not seen.
        evaluation: how long the sequences are and how many.
        stop: looked at between sequences.
    """

    def check() -> None:
        if stop.signum is not None:
            raise Interrupted(
                f"{stop.name} in the evaluation; the model is saved; continue with --resume",
                stop.signum,
            )

    device, config = result.model.head_weight.device, result.config
    # Half a context apart: what differs between means over so many positions is not the text.
    windows = spaced_windows(
        held_out,
        evaluation.eval_length,
        evaluation.eval_windows,
        distance=config.context // 2,
    )
    enabled = config.dtype == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled), not_compiled():
        losses = token_losses(result.model, windows, check=check)
    return losses.double().mean(dim=0).float().numpy()


def binned(losses: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Return the means over `size` positions after `size` positions; the last bin may be smaller.

    Examples:
        >>> binned(np.arange(5.0), 2).tolist()
        [0.5, 2.5, 4.0]
    """
    starts = np.arange(0, len(losses), size)
    counts = np.diff(np.append(starts, len(losses)))
    return np.add.reduceat(losses.astype(np.float64), starts) / counts


def loss_at_length(losses: np.ndarray[Any, Any], length: int) -> float:
    """Return the mean over the last half of the positions up to a length."""
    return float(losses[length // 2 : length].mean())


def loss_at_end(losses: np.ndarray[Any, Any]) -> float:
    """Return the mean over the last eighth of the positions."""
    return float(losses[-(len(losses) // 8 or 1) :].mean())
