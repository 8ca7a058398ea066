"""Which kernels another process holds in its memory, however it came by them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dacnn.errors import ArtefactError
from dacnn.measure.search import KernelSearch
from dacnn.measure.stored import StoredArray

# regions of these sizes are reserved rather than used, and read as zeros for minutes
_LARGEST = 8 << 30


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


def held_by(pid: int, kernels: Sequence[StoredArray], files: Sequence[Path] = ()) -> tuple[Held, ...]:
    """Search the memory of a process for kernels.

    Args:
        pid: The process, which has to stand still, and be this one's child or otherwise open to it.
        kernels: The kernels.
        files: Mapped files that count as memory, such as the artefact itself.

    Returns:
        What was found, for each of the kernels.

    Raises:
        ArtefactError: The memory cannot be read.
    """
    search, found = KernelSearch(kernels), []
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        try:
            for start, end in _regions(pid, files):
                if end - start > _LARGEST:
                    continue
                data = os.pread(memory, end - start, start)
                found += search.find(np.frombuffer(data, np.uint8), aligned=True)
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
        for kernel, each in zip(kernels, copies, strict=True)
    )
