"""The sizes in which an experiment can be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from householder.train.errors import ConfigError

T = TypeVar("T")


def of_size(experiment: str, sizes: Mapping[str, T], size: str) -> T:
    """Return what an experiment has of a size.

    Args:
        experiment: the command's name, for the error.
        sizes: by name: "cpu" takes minutes on two cores, "gpu" is the published scale or near it.
        size: the one that is asked for.

    Raises:
        ConfigError: the experiment has no such size.

    Examples:
        >>> of_size("flip-flop", {"cpu": 128, "gpu": 512}, "cpu")
        128
    """
    if size not in sizes:
        raise ConfigError(
            f"{experiment}: `size` must be one of {', '.join(sizes)}, got {size!r}; cpu takes "
            "minutes on two cores, gpu wants a GPU"
        )
    return sizes[size]
