"""Metrics for well-kept viewers: TensorBoard and, offline, Weights & Biases."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from householder.train.errors import ConfigError
from householder.train.text.config import TextConfig


def require_viewers(config: TextConfig) -> None:
    """Raise ConfigError if a viewer that the settings ask for is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"`{name}` must be installed where it is asked for, and is not; pip install {name}"
            )


class Trackers:
    """Hand every record of the metrics to the viewers that the settings ask for.

    Args:
        config: `tensorboard`, `wandb`, and what the latter shows as settings.
        folder: of the run.
        after_step: where the run continues from. TensorBoard then drops what a killed run wrote
            beyond it; Weights & Biases shows a second run.
        enabled: whether this process writes at all.

    Raises:
        ConfigError: a viewer's library is not installed.
    """

    def __init__(self, config: TextConfig, folder: Path, *, after_step: int, enabled: bool) -> None:
        self._events: Any = None
        self._run: Any = None
        if not enabled:
            return
        require_viewers(config)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = after_step + 1 if after_step else None
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        if config.wandb:
            import wandb

            self._run = wandb.init(dir=str(folder), mode="offline", config=config.to_dict())

    def write(self, record: dict[str, Any]) -> None:
        """Write the numbers of a record; it must have a `step`."""
        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, record["step"])
        if self._run is not None:
            self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Flush and close what is open."""
        if self._events is not None:
            self._events.close()
        if self._run is not None:
            self._run.finish()
