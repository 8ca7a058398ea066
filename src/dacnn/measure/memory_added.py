"""The memory that loading an artefact adds to a process, measured in a fresh one."""

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from dacnn.errors import ArtefactError

_MAP = Path("/proc/self/smaps_rollup")
_HOLD = "hold"

# What a loader is: called with None it readies its runtime with something tiny; called with a path it loads that, runs it once
# where it can, and returns what is to be kept while the memory is read, and in words what it did.
Loader = Callable[[Path | None], tuple[object, str]]


@dataclass(frozen=True)
class MemoryAdded:
    """Memory after minus before loading.

    Attributes:
        anonymous_bytes: Private memory that belongs to no file (`Anonymous` of /proc/self/smaps_rollup): nobody can share it,
            and the system cannot drop and read it again.
        resident_bytes: All memory in RAM (`Rss`), pages of mapped files included.
        loaded: What was loaded, and whether it was run, in words.
    """

    anonymous_bytes: int
    resident_bytes: int
    loaded: str


def read_memory_bytes() -> dict[str, int]:
    """The sizes in this process's memory map, in bytes, by their names in /proc/self/smaps_rollup.

    Raises:
        ArtefactError: This is not Linux.
    """
    try:
        lines = _MAP.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        raise ArtefactError(f"memory is measured on Linux only: {_MAP} is not here: audit without --memory") from None
    fields = (line.split() for line in lines)
    return {name.rstrip(":"): int(size) * 1024 for name, size, *_ in fields}


def give_back_memory() -> None:
    """Give all that this process has freed back to the system, where the C library can: it then reads as zeros."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _command(loader: str, path: Path, *more: str) -> list[str]:
    """The words that start a fresh process."""
    return [sys.executable, "-W", "ignore", "-m", __name__, loader, str(path), *more]


def _function(loader: str) -> Loader:
    module, _, name = loader.partition(":")
    found: Loader = getattr(importlib.import_module(module), name)
    return found


def memory_added(loader: str, path: Path) -> MemoryAdded:
    """Load an artefact in a fresh process and measure what that adds to it.

    The process imports the loader's runtime and runs something tiny before the first reading, so that libraries, thread pools
    and scratch memory that any model needs are not counted.

    Args:
        loader: `module:function` of a `Loader`, importable in a fresh process.
        path: The artefact.

    Returns:
        The memory that was added, the artefact still being loaded.

    Raises:
        ArtefactError: This is not Linux, or the artefact cannot be loaded.
    """
    read_memory_bytes()
    done = subprocess.run(_command(loader, path), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ArtefactError(f"{path}: cannot be loaded to measure its memory: {reason}")
    return MemoryAdded(**json.loads(lines[-1]))


@contextmanager
def holding(loader: str, path: Path) -> Iterator[int]:
    """Load an artefact in a fresh process that then stands still.

    What that process has given back is overwritten, so that nothing is seen in its memory that is not in use.

    Args:
        loader: `module:function` of a `Loader`.
        path: The artefact.

    Yields:
        The number of the process, which ends behind the block.

    Raises:
        ArtefactError: This is not Linux, or the artefact cannot be loaded.
    """
    read_memory_bytes()
    # of the GNU C library: bytes that are written over what is freed
    environment = os.environ | {"MALLOC_PERTURB_": "165"}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            _command(loader, path, _HOLD),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        try:
            # a library may print as well
            if not any(line.strip() == _HOLD for line in cast(IO[str], process.stdout)):
                errors.seek(0)
                reason = (errors.read().strip() or "it ended").splitlines()[-1]
                raise ArtefactError(f"{path}: cannot be loaded to search its memory: {reason}")
            yield process.pid
        finally:
            process.kill()


def _hold(loader: str, path: Path) -> None:
    """What that process does."""
    held = _function(loader)(path)
    give_back_memory()
    print(_HOLD, flush=True)
    sys.stdin.read()
    del held


def _measure(loader: str, path: Path) -> None:
    """What the fresh process does: print one JSON line."""
    load = _function(loader)
    load(None)
    gc.collect()
    before = read_memory_bytes()
    held, words = load(path)
    gc.collect()
    after = read_memory_bytes()
    del held
    table = {
        "anonymous_bytes": after["Anonymous"] - before["Anonymous"],
        "resident_bytes": after["Rss"] - before["Rss"],
        "loaded": words,
    }
    print(json.dumps(table))


if __name__ == "__main__":
    (_hold if sys.argv[3:] == [_HOLD] else _measure)(sys.argv[1], Path(sys.argv[2]))
