"""Loops over a few images at a time, and what is left of them where only their memory is asked for."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

Part = TypeVar("Part")


def to_do(parts: Sequence[Part], of: Tensor) -> Sequence[Part]:
    """The parts that a loop has to go through.

    Args:
        parts: All of them; none takes more memory than the first.
        of: What they are parts of.

    Returns:
        All; the first alone of a tensor without values, which is there to see what memory is taken.
    """
    return parts[:1] if is_fake(of) else parts
