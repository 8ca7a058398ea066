"""The compiled C file as a callable on NumPy arrays: `dacnn.runtime.load("net.so")(images)`."""

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dacnn.errors import ArtefactError, ShapeError

# N images, H rows, W columns, C channels, K classes

# of the description below, as the library counts it
_ABI = 1
# of a cache line and of the widest vectors, in bytes
_ALIGN = 64
# how often a thread comes back for more images of a batch: few enough that asking for them costs nothing
_TURNS = 4

_INIT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_PATH = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


_SIZES = ("abi", "height", "width", "channels", "classes", "context_bytes", "workspace_bytes")


class _Description(ctypes.Structure):
    """`dacnn_description` of the generated C."""

    _fields_ = (
        *((name, ctypes.c_int) for name in _SIZES),
        ("name", ctypes.c_char_p),
        ("class_names", ctypes.POINTER(ctypes.c_char_p)),
        ("init_path", _INIT),
        ("path", _PATH),
        ("run", _RUN),
    )


class Compiled:
    """A network in a shared library. Threads may call one object at the same time.

    Attributes:
        name: What the network's file is called.
        input_shape: H, W and C of an image.
        classes: Names of the classes.
        context_bytes: Memory that all calls share: the transformed kernels.
        workspace_bytes: Memory of each call that runs at the same time.
    """

    def __init__(self, description: Any, library: ctypes.CDLL, path: str | None, where: str) -> None:
        """Prepare the kernels.

        Args:
            description: What the library says of itself.
            library: Kept loaded as long as this object lives.
            path: Name of the code to run; None: the fastest.
            where: The file, for messages.
        """
        self._library = library
        self._of = description
        self.name: str = description.name.decode()
        self.input_shape = (description.height, description.width, description.channels)
        self.classes = tuple(description.class_names[index].decode() for index in range(description.classes))
        self.context_bytes: int = description.context_bytes
        self.workspace_bytes: int = description.workspace_bytes
        self._context = _aligned(self.context_bytes)
        if description.init_path(self._context.ctypes.data, None if path is None else path.encode()) != 0:
            raise ArtefactError(f"{where}: path '{path}' is not in it or needs another processor: leave it out for the fastest")
        # list.pop and list.append are each one step, whatever other threads do
        self._free: list[NDArray[np.uint8]] = []

    @property
    def path(self) -> str:
        """Name of the code that runs: `portable`, or that of a vector unit."""
        return str(self._of.path(self._context.ctypes.data).decode())

    def __call__(self, images: NDArray[np.uint8], threads: int = 1) -> NDArray[np.float32]:
        """Logits of images.

        Args:
            images: uint8, shape (N, H, W, C), or (H, W, C) for one.
            threads: How many to use; each takes the next few images as soon as it has done its last.

        Returns:
            Shape (N, K); (1, K) for one image.

        Raises:
            ShapeError: The images are of another shape or type, or `threads` is below 1.
        """
        batch = self._batch(images)
        if threads < 1:
            raise ShapeError(f"threads is {threads}: expected 1 or more")
        logits = np.empty((len(batch), len(self.classes)), np.float32)
        threads = min(threads, len(batch))
        if threads < 2:
            self._run(batch, logits, iter([(0, len(batch))]))
            return logits
        # a core that has other work as well, or is a slower one, takes fewer of them
        step = -(-len(batch) // (threads * _TURNS))
        spans = iter([(first, first + step) for first in range(0, len(batch), step)])
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(self._run, batch, logits, spans) for _ in range(threads - 1)]
            self._run(batch, logits, spans)
            for other in others:
                other.result()
        return logits

    def _batch(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        array = np.asarray(images)
        batch = array[None] if array.ndim == 3 else array
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != self.input_shape:
            size = " x ".join(map(str, self.input_shape))
            raise ShapeError(
                f"images are {array.dtype} of shape {array.shape}: '{self.name}' takes uint8 of shape N x {size} or {size}"
            )
        return np.ascontiguousarray(batch)

    def _run(self, batch: NDArray[np.uint8], logits: NDArray[np.float32], spans: Iterator[tuple[int, int]]) -> None:
        """Images from first to end, of each span that no other thread has taken; other Python threads run meanwhile."""
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = _aligned(self.workspace_bytes)
        for first, end in spans:
            images, results = batch[first:end], logits[first:end]
            places = (self._context, workspace, images, results)
            self._of.run(*(array.ctypes.data for array in places), len(images))
        self._free.append(workspace)


def load(file: str | os.PathLike[str], path: str | None = None) -> Compiled:
    """Load what `dacnn export --to c --build` has compiled. Code in the file runs: load only what you trust.

    Args:
        file: The shared library.
        path: Name of the code to run, as `portable`; None: the fastest that this processor has.

    Returns:
        The network, to be called on images.

    Raises:
        ArtefactError: The file is no such library, or has no such path.
    """
    where = os.fspath(file)
    if not Path(where).is_file():
        raise ArtefactError(f"{where}: no such file: expected a shared library from 'dacnn export --to c --build'")
    try:
        library = _opened(Path(where).resolve())
        describe: Callable[[], int] = library.dacnn_describe
    except (OSError, AttributeError) as error:
        said = str(error).splitlines()[0]
        raise ArtefactError(f"{where}: no library of a network: {said}: make one by 'dacnn export --to c --build'") from None
    describe.restype = ctypes.POINTER(_Description)  # type: ignore[attr-defined]
    description = describe().contents  # type: ignore[attr-defined]
    if description.abi != _ABI:
        raise ArtefactError(f"{where}: its layout has number {description.abi}: expected {_ABI}: export it again")
    return Compiled(description, library, path, where)


def _opened(file: Path) -> ctypes.CDLL:
    # a loader remembers names: under its own one, a file that was replaced would be the old one as long as that is in use
    with tempfile.TemporaryDirectory(prefix="dacnn-") as folder:
        name = Path(folder) / file.name
        name.symlink_to(file)
        return ctypes.CDLL(str(name))


def _aligned(size: int) -> NDArray[np.uint8]:
    """Memory that begins at a cache line."""
    memory = np.zeros(size + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + size]
