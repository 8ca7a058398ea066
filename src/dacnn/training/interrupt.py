"""Ctrl-C and termination wait for the end of a step, so that what is saved is a whole state."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupts:
    """Whether somebody asked the training to stop."""

    def __init__(self) -> None:
        """Begin without a request."""
        self.requested = False


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Turn the first SIGINT or SIGTERM into a request; a second one interrupts at once.

    Yields:
        The request, to be looked at between steps. Outside the main thread signals cannot be caught: nothing changes.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return

    def request(number: int, frame: FrameType | None) -> None:
        if interrupts.requested:
            raise KeyboardInterrupt
        interrupts.requested = True

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
