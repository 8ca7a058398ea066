"""Where each value lies in one static array: decided here, so that the C code has no heap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """What a step of the C code does with memory.

    Attributes:
        takes: Names of the values that it reads.
        gives: Name of the value that it writes.
        over: Those of the values it takes that it may write over, place by place.
    """

    takes: tuple[str, ...]
    gives: str
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """A plan of the array.

    Attributes:
        offsets: Where each value begins, in the unit of its size; values that are written over another have its offset.
        size: Of the array.
    """

    offsets: Mapping[str, int]
    size: int


@dataclass
class _Buffer:
    """Values that lie in one place one after the other, from the first step that writes it to the last that reads it."""

    size: int
    first: int
    last: int


def plan(uses: Sequence[Use], sizes: Mapping[str, int], outside: Mapping[str, int], align: int = 1) -> Memory:
    """Place values so that those that live at the same time do not overlap; the largest come first, each as low as it can.

    Args:
        uses: The steps in order.
        sizes: Of each value, in any unit.
        outside: Values that lie elsewhere, and what stands for their offset.
        align: Offsets are multiples of this.

    Returns:
        The plan.
    """
    buffers, holder = _buffers(uses, sizes, outside)
    placed: dict[str, int] = {}
    for name in sorted(buffers, key=lambda name: (-buffers[name].size, buffers[name].first)):
        placed[name] = _lowest(buffers[name], [(placed[other], buffers[other]) for other in placed], align)
    size = max((placed[name] + buffers[name].size for name in placed), default=0)
    return Memory({value: outside[name] if name in outside else placed[name] for value, name in holder.items()}, size)


def _buffers(
    uses: Sequence[Use], sizes: Mapping[str, int], outside: Mapping[str, int]
) -> tuple[dict[str, _Buffer], dict[str, str]]:
    """Buffers by the name of the first value in each, and for every value the buffer that holds it."""
    last = {name: index for index, use in enumerate(uses) for name in use.takes}
    buffers: dict[str, _Buffer] = {}
    holder = {name: name for name in outside}
    for index, use in enumerate(uses):
        if use.gives in outside:
            continue
        over = next((name for name in use.over if last[name] <= index and name not in outside), None)
        until = last.get(use.gives, index)
        if over is None:
            buffers[use.gives] = _Buffer(sizes[use.gives], index, until)
            holder[use.gives] = use.gives
        else:
            buffer = buffers[holder[over]]
            buffer.last = max(buffer.last, until)
            holder[use.gives] = holder[over]
    return buffers, holder


def _lowest(buffer: _Buffer, placed: Sequence[tuple[int, _Buffer]], align: int) -> int:
    """The first gap among the buffers that live at the same time."""
    taken = sorted(
        (offset, offset + other.size) for offset, other in placed if other.first <= buffer.last and buffer.first <= other.last
    )
    offset = 0
    for begin, end in taken:
        if offset + buffer.size <= begin:
            break
        offset = max(offset, -(-end // align) * align)
    return offset
