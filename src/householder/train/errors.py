"""The errors of training. `ConfigError` is the caller's to mend; `RunError` happened on the way."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot be: unknown, of the wrong type, out of range or contradictory."""


class RunError(RuntimeError):
    """A run that could not start, continue or finish."""


class OutputError(RunError):
    """The output folder is occupied, unwritable, or holds nothing to resume."""


class CheckpointError(RunError):
    """A checkpoint is damaged or does not fit the requested configuration."""


class NonFiniteError(RunError):
    """The loss or the gradient became infinite or not a number.

    Attributes:
        step: the first step (counted from 1) at which it happened.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(RunError):
    """A signal asked the run to stop; a checkpoint was written first.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
