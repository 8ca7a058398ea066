"""Which kernels another process holds in its memory, however it came by them."""

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dacnn.errors import ArtefactError
from dacnn.measure.search import Found, KernelSearch
from dacnn.measure.stored import StoredArray

# regions of these sizes are reserved rather than used, and read as zeros for minutes
_LARGEST = 8 << 30
_AT_ONCE = 1 << 30


@dataclass(frozen=True)
class Held:
    """Copies of one kernel in memory.

    Attributes:
        name: Of the kernel.
        count: How many there are.
        nbytes: Bytes of all of them.
        differences: Every way in which some differ from it, as `Difference.words`.
    """

    name: str
    count: int
    nbytes: int
    differences: tuple[tuple[str, ...], ...]


def _regions(pid: int, files: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """First byte and the one behind the last of what is readable and belongs to no file, or to one of some."""
    wanted = {str(file.resolve()) for file in files}
    last: tuple[int, int] | None = None
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        place, rights, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in place.split("-"))
        called = name[0] if name else ""
        # what begins so is the system's
        counts = not called or called in wanted or (called.startswith("[") and not called.startswith("[v"))
        if not rights.startswith("r") or not counts:
            continue
        if last is not None and last[1] == start:
            last = (last[0], end)
            continue
        if last is not None:
            yield last
        last = (start, end)
    if last is not None:
        yield last


def _read(memory: int, start: int, end: int) -> NDArray[np.uint8]:
    """A region, zeros where a page of it cannot be read: one that guards a stack, or is behind the end of a file."""
    data = np.zeros(end - start, np.uint8)
    place = 0
    while place < len(data):
        try:
            # no more than two gigabytes are read at once, and less than was asked for in front of such a page
            done = os.preadv(memory, [data[place : place + _AT_ONCE].data], start + place)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            done = 0
        place += done or mmap.PAGESIZE
    return data


def held_by(pid: int, kernels: Sequence[StoredArray], files: Sequence[Path] = ()) -> tuple[Held, ...]:
    """Search the memory of a process for kernels.

    Args:
        pid: The process, which has to stand still, and be this one's child or otherwise open to it.
        kernels: The kernels.
        files: Mapped files that count as memory, such as the artefact itself.

    Returns:
        What was found, for each of the kernels that can be told from other bytes.

    Raises:
        ArtefactError: The memory cannot be read.
    """
    search = KernelSearch(kernels)
    found: list[Found] = []
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        try:
            for start, end in _regions(pid, files):
                if end - start > _LARGEST:
                    continue
                found += search.find(_read(memory, start, end), aligned=True)
        finally:
            os.close(memory)
    except OSError as error:
        raise ArtefactError(f"the memory of process {pid} cannot be searched: {error.strerror or error}") from None
    copies = [[copy for copy in found if copy.kernel == index] for index in range(len(kernels))]
    return tuple(
        Held(
            kernel.name,
            len(each),
            sum(copy.array.nbytes for copy in each),
            tuple(dict.fromkeys(copy.difference.words for copy in each)),
        )
        for index, (kernel, each) in enumerate(zip(kernels, copies, strict=True))
        if index in search.looked_for
    )
