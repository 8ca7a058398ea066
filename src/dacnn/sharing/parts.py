"""Loops over a few images at a time, and what is left of them where only their memory is asked for."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

Part = TypeVar("Part")

_first_alone: ContextVar[bool] = ContextVar("first alone", default=False)


@contextlib.contextmanager
def first_part_alone() -> Iterator[None]:
    """Within this context loops end behind their first part: for tensors without values, to see what memory is taken."""
    token = _first_alone.set(True)
    try:
        yield
    finally:
        _first_alone.reset(token)


def to_do(parts: Sequence[Part]) -> Sequence[Part]:
    """The parts that a loop has to go through.

    Args:
        parts: All of them; none takes more memory than the first.
    """
    return parts[:1] if _first_alone.get() else parts
