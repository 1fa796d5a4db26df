"""Signals that ask a run to stop: noted when they come, obeyed where it is safe."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remember the first signal that asked the run to stop.

    Attributes:
        signum: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    @property
    def name(self) -> str:
        """The signal's name, for messages."""
        return "no signal" if self.signum is None else signal.Signals(self.signum).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a `StopRequest` for the time of the block.

    The first signal is only noted; a second one acts as it would have without the block, so that a
    run which hangs can still be stopped. Outside the main thread, where Python does not deliver
    signals, nothing is changed.

    Yields:
        The request to look at between steps.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def note(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        restore()
        if sys.stderr.isatty():
            # Not by print, which the signal may have interrupted.
            os.write(sys.stderr.fileno(), b"\nstopping after this step; once more: at once\n")

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    for signum in SIGNALS:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        restore()
