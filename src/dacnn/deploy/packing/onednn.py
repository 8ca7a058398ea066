"""Kernels as oneDNN packs them on a CPU: once per layout, each pack read by every layer that wants that layout.

Which layout is fast depends on the size of the image: where a CPU has AVX2 only, 32x32 and 16x16 want different ones, and the
wrong one takes ten times as long. So oneDNN is asked for every size that is met, once per shape of kernel for all networks of a
process. A second pack of a kernel has to earn its memory: it is kept if reordering the first one at every call was
measured to be slower, in a short trial.
"""

import ctypes
import hashlib
import math
import mmap
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from dacnn.deploy.program import Convolve
from dacnn.deploy.shapes import windows

# N images, C channels, H rows, W columns, O output channels, I input channels

Shape = tuple[int, ...]
Margin = tuple[int, int, int, int]

# packs of one kernel: enough for the sizes of a network's stages, and a bound where images of many sizes come
_MOST_PACKS = 3
# a pack that saves less than this share of the reader's time is not worth its memory
_WORTH = 0.05
_TRIALS = 7
# shapes of images that a reader's choice is remembered for
_MOST_CHOICES = 256


@dataclass(frozen=True)
class Geometry:
    """How a reader slides its kernel: padding above and below, left and right."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Slide:
    """How a window is slid over images that may have to be padded first: oneDNN takes even padding alone.

    Attributes:
        geometry: How it is slid over the padded images.
        margin: Zeros to the left, right, above and below that are put around them before.
    """

    geometry: Geometry
    margin: Margin

    def padded(self, images: Shape) -> Shape:
        """Shape of the padded images."""
        left, right, above, below = self.margin
        return (*images[:2], images[2] + above + below, images[3] + left + right)

    def windows(self, images: Shape, size: Sequence[int]) -> list[int]:
        """Rows and columns of windows, whose size is that of a kernel or of a pooling."""
        of = self.geometry
        reach = [1 + (side - 1) * apart for side, apart in zip(size, of.dilation, strict=True)]
        return windows(self.padded(images), reach, of.stride, (*of.padding, *of.padding))


def slide_of(step: Convolve) -> Slide:
    """How a step slides its kernel."""
    above, left, below, right = step.padding
    if (above, left) == (below, right):
        return Slide(Geometry(step.stride, (above, left), step.dilation, step.groups), (0, 0, 0, 0))
    return Slide(Geometry(step.stride, (0, 0), step.dilation, step.groups), (left, right, above, below))


def is_available() -> bool:
    """Whether this PyTorch can pack kernels."""
    names = ("_convolution_pointwise", "_reorder_convolution_weight", "_nbytes", "data_ptr")
    return torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in names)


def reorder(plain: Tensor, geometry: Geometry, images: Shape) -> Tensor:
    """Pack a kernel as oneDNN likes it best for images of one shape.

    Args:
        plain: The kernel, (O, I, H, W).
        geometry: How it is slid.
        images: What it is slid over, N x C x H x W.

    Returns:
        An opaque tensor that only oneDNN reads.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight.default(
        plain, geometry.padding, geometry.stride, geometry.dilation, geometry.groups, images
    )
    return packed


def packed_bytes(packed: Tensor) -> int:
    """Bytes of an opaque tensor."""
    return int(torch.ops.mkldnn._nbytes(packed))


def _convolved(geometry: Geometry) -> Callable[[Tensor, Tensor], Tensor]:
    """From images and a pack to their convolution, then ReLU."""
    slid = geometry.padding, geometry.stride, geometry.dilation, geometry.groups
    call = torch.ops.mkldnn._convolution_pointwise.default
    return lambda x, pack: cast(Tensor, call(x, pack, None, *slid, "relu", [], ""))


def _probe(kernel: Shape, dtype: torch.dtype) -> Tensor:
    """Random numbers of a kernel's shape, in memory that goes back to the system when they are let go."""
    memory = mmap.mmap(-1, math.prod(kernel) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(kernel).uniform_(generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=4096)
def _layout(kernel: Shape, dtype: torch.dtype, geometry: Geometry, images: Shape, threads: int) -> str:
    """Name of the layout that oneDNN wants, equal for equal layouts: a digest of what it makes of random numbers."""
    packed = reorder(_probe(kernel, dtype), geometry, images)
    held = (ctypes.c_ubyte * packed_bytes(packed)).from_address(torch.ops.mkldnn.data_ptr(packed))
    # groups are a dimension of what is packed
    return f"{geometry.groups} {hashlib.blake2b(memoryview(held), digest_size=8).hexdigest()}"


def layouts_known() -> int:
    """How often a layout was not known yet: the number stands still while networks of known architectures are packed."""
    return _layout.cache_info().misses


@lru_cache(maxsize=4096)
def _saving(kernel: Shape, dtype: torch.dtype, geometry: Geometry, images: Shape, threads: int) -> float:
    """Share of a reader's time that a pack of its own saves, beside reordering another pack at every call: a short trial."""
    packed = reorder(_probe(kernel, dtype), geometry, images)
    x = torch.zeros(images, dtype=dtype).contiguous(memory_format=torch.channels_last)
    convolved = _convolved(geometry)

    def own() -> None:
        convolved(x, packed)

    def reordered() -> None:
        convolved(x, reorder(packed.to_dense().view(kernel), geometry, images))

    seconds: dict[Callable[[], None], list[float]] = {own: [], reordered: []}
    for trial in range(_TRIALS + 1):
        for call, taken in seconds.items():
            begin = time.perf_counter()
            call()
            # the first turn generates code
            if trial:
                taken.append(time.perf_counter() - begin)
    return 1 - statistics.median(seconds[own]) / statistics.median(seconds[reordered])


class PackedKernel:
    """One kernel, held once per layout that its readers want.

    Attributes:
        name: The tensor's name in the program.
        shape: (O, I, H, W).
        dtype: Its number format.
        readers: For every layout that was asked for, the sizes of images, H x W, that want it.
        kept: Layouts that it is held in; the others are made at every call.
    """

    def __init__(self, name: str, plain: Tensor) -> None:
        """Take a kernel; it is packed when it is first read, and `plain` is let go then."""
        self.name = name
        self.shape = tuple(plain.shape)
        self.dtype = plain.dtype
        self.readers: dict[str, list[tuple[int, int]]] = {}
        self._plain: Tensor | None = plain
        self._packs: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @property
    def kept(self) -> tuple[str, ...]:
        """Layouts that it is held in."""
        return tuple(self._packs)

    @property
    def nbytes(self) -> int:
        """Bytes of all its packs."""
        with self._lock:
            plain = 0 if self._plain is None else self._plain.nbytes
            return plain + sum(map(packed_bytes, self._packs.values()))

    def read(self, geometry: Geometry, images: Shape) -> tuple[Tensor, bool]:
        """The kernel as a convolution over images of a shape wants it.

        Args:
            geometry: How the reader slides it.
            images: N x C x H x W.

        Returns:
            An opaque tensor, and whether it is kept: where that is not worth its memory it is made for this call.
        """
        asked = (self.shape, self.dtype, geometry, images, torch.get_num_threads())
        with self._lock:
            # the first pack is made before any question is asked, since it stays and what answers take goes
            first = reorder(self._any(), geometry, images) if self._plain is not None else None
            layout = _layout(*asked)
            sizes = self.readers.setdefault(layout, [])
            size = (images[2], images[3])
            if size not in sizes and len(sizes) < _MOST_CHOICES:
                sizes.append(size)
            if first is not None:
                self._packs[layout], self._plain = first, None
            if layout in self._packs:
                return self._packs[layout], True
            pack = reorder(self._any(), geometry, images)
            worth = len(self._packs) < _MOST_PACKS and _saving(*asked) > _WORTH
            if worth:
                self._packs[layout] = pack
            return pack, worth

    def _any(self) -> Tensor:
        return self._plain if self._plain is not None else next(iter(self._packs.values())).to_dense().view(self.shape)

    def describe(self) -> str:
        """One line: its packs, and who reads which."""
        with self._lock:
            readers, kept = {layout: list(sizes) for layout, sizes in self.readers.items()}, set(self._packs)
        held = [
            " ".join(f"{rows}x{columns}" for rows, columns in sizes) + " (made at every call)" * (layout not in kept)
            for layout, sizes in readers.items()
        ]
        packs = f"{len(kept)} pack{'s' * (len(kept) != 1)}"
        return f"{self.name} {'x'.join(map(str, self.shape))}: {packs}, {self.nbytes:,} bytes; for images of {' | '.join(held)}"
