"""The images a training reads: all decoded in memory, or decoded when asked for."""

# N images, B images of one batch, H rows, W columns, C channels

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dacnn.data.fit import Pixels
from dacnn.data.records import RawStore, Records
from dacnn.errors import DataError
from dacnn.networks.plan import Input

Progress = Callable[[str, int, int], None]

# most images per task of a thread: enough to hide the cost of handing it over, few enough for a smooth progress bar
_CHUNK = 64


class ImageSet(ABC):
    """Images of one size with their labels.

    Attributes:
        labels: Class of each image, int64, shape (N,).
        classes: Names of the classes.
    """

    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the images take in memory, decoded or not; what stays on disk is not counted."""

    @abstractmethod
    def gather(self, indices: Tensor) -> Tensor:
        """Some images.

        Args:
            indices: int64, shape (B,), each from 0 to N - 1.

        Returns:
            uint8, shape (B, H, W, C).

        Raises:
            DataError: An image cannot be decoded.
        """


@dataclass(frozen=True, eq=False)
class MemoryImages(ImageSet):
    """All images decoded.

    Attributes:
        images_nhwc: uint8, shape (N, H, W, C).
        labels: int64, shape (N,).
        classes: Names of the classes.
    """

    images_nhwc: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that every image has a label.

        Raises:
            DataError: The numbers differ, or the images are no uint8 N x H x W x C.
        """
        if self.images_nhwc.dtype != torch.uint8 or self.images_nhwc.ndim != 4 or len(self.images_nhwc) != len(self.labels):
            raise DataError(
                f"images are {self.images_nhwc.dtype} of shape {tuple(self.images_nhwc.shape)} with {len(self.labels)} labels: "
                "expected uint8 of shape (N, H, W, C) and N labels"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images."""
        return self.images_nhwc.nbytes

    def gather(self, indices: Tensor) -> Tensor:
        """Some images, uint8, shape (B, H, W, C)."""
        return self.images_nhwc.index_select(0, indices.to(self.images_nhwc.device))

    def to(self, device: torch.device) -> "MemoryImages":
        """The same images on a device, where batches are then gathered without waiting for the CPU."""
        return MemoryImages(self.images_nhwc.to(device), self.labels.to(device), self.classes)


@dataclass(frozen=True, eq=False)
class StreamedImages(ImageSet):
    """Images decoded when they are asked for, by a few threads (Pillow lets go of the interpreter while it decodes).

    Attributes:
        records: The undecoded images.
        input: What they are brought to.
    """

    records: Records
    input: Input

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        """Class of each image, int64, shape (N,)."""
        return torch.from_numpy(self.records.labels)

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes."""
        return self.records.classes

    @property
    def nbytes(self) -> int:
        """Bytes of the undecoded images in memory."""
        return self.records.store.nbytes

    def gather(self, indices: Tensor) -> Tensor:
        """Some images, decoded now, uint8, shape (B, H, W, C)."""
        return torch.from_numpy(_decode(self.records.select(indices.numpy()), self.input, None))


def load_records(records: Records, input: Input, *, in_memory: bool, name: str, progress: Progress | None = None) -> ImageSet:
    """Decode the images once, or leave them to be streamed.

    Args:
        records: The undecoded images.
        input: What they are brought to.
        in_memory: Whether they are decoded now and kept.
        name: What is being decoded, for the progress.
        progress: Called with the name, the images done and all images.

    Returns:
        The images, in memory or streamed.

    Raises:
        DataError: An image cannot be decoded.
    """
    if not in_memory:
        return StreamedImages(records, input)

    def report(done: int) -> None:
        if progress:
            progress(name, done, len(records))

    return MemoryImages(torch.from_numpy(_decode(records, input, report)), torch.from_numpy(records.labels), records.classes)


def _decode(records: Records, input: Input, report: Callable[[int], None] | None) -> Pixels:
    """All images of the records, fitted, shape (N, H, W, C); `report` is called with the number done."""
    shape = (input.height, input.width, input.channels)
    if isinstance(records.store, RawStore) and records.store.images_nhwc.shape[1:] == shape:
        return records.store.images_nhwc[records.rows]
    images_nhwc = np.empty((len(records), *shape), np.uint8)
    chunk = max(1, min(_CHUNK, len(records) // (4 * _threads())))

    def fill(start: int) -> int:
        stop = min(start + chunk, len(records))
        for index in range(start, stop):
            images_nhwc[index] = records.read(index, input)
        return stop

    with ThreadPoolExecutor(_threads()) as pool:
        try:
            for done in pool.map(fill, range(0, len(records), chunk)):
                if report:
                    report(done)
        except BaseException:
            # without this, one unreadable image would be reported only after all others are decoded
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return images_nhwc


def _threads() -> int:
    """Cores this process may use, at most 16: beyond that, the interpreter between two images is the limit."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, allowed)
