"""What a source finds: images not yet decoded, where each of them stands, and their labels."""

# N images, H rows, W columns, C channels

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from dacnn.data.fit import Pixels, fit_image, open_image, read_image
from dacnn.errors import DataError
from dacnn.networks.plan import Input

Indices = npt.NDArray[np.int64]


class Store(Protocol):
    """Where undecoded images are kept; rows count from 0."""

    @property
    def nbytes(self) -> int:
        """Bytes that the undecoded images take in memory (none where they stay on disk)."""

    def where(self, row: int) -> str:
        """Names one image in an error message."""

    def open(self, row: int) -> Image.Image:
        """One image, its size and mode known."""

    def read(self, row: int, input: Input) -> Pixels:
        """One image, decoded and fitted: uint8, shape (H, W, C)."""


@dataclass(frozen=True)
class Parts:
    """The files that the rows of a store come from, one behind the other.

    Attributes:
        names: What to call each file.
        counts: Images in each.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]

    def where(self, row: int) -> str:
        """The file of a row, and the place in it (from 0)."""
        for name, count in zip(self.names, self.counts, strict=True):
            if row < count:
                return f"{name}, image {row}"
            row -= count
        return f"image {row} behind {self.names[-1]}"


@dataclass(frozen=True)
class RawStore:
    """Pixels as they are, uint8, shape (N, H, W, C) with 1 or 3 channels."""

    images_nhwc: Pixels
    parts: Parts

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return int(self.images_nhwc.nbytes)

    def where(self, row: int) -> str:
        """Names one image in an error message."""
        return self.parts.where(row)

    def open(self, row: int) -> Image.Image:
        """One image."""
        pixels = self.images_nhwc[row]
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def read(self, row: int, input: Input) -> Pixels:
        """One image, fitted."""
        return fit_image(self.open(row), input)


@dataclass(frozen=True)
class FileStore:
    """One file per image."""

    paths: tuple[Path, ...]
    nbytes: int = 0

    def where(self, row: int) -> str:
        """The path."""
        return str(self.paths[row])

    def open(self, row: int) -> Image.Image:
        """One image, its size and mode known."""
        return open_image(self.paths[row], self.where(row))

    def read(self, row: int, input: Input) -> Pixels:
        """One image, decoded and fitted."""
        return read_image(self.paths[row], input)


@dataclass(frozen=True)
class ArrowStore:
    """Encoded image files in Arrow columns, in memory or mapped from disk.

    Attributes:
        encoded: Column of bytes (pyarrow.ChunkedArray); null where only a path is given.
        paths: Column of paths, or None.
        parts: The files that the rows come from.
        nbytes: Bytes of the columns in memory; 0 if mapped.
    """

    encoded: Any
    paths: Any
    parts: Parts
    nbytes: int

    def where(self, row: int) -> str:
        """Names one image in an error message."""
        return self.parts.where(row)

    def _source(self, row: int) -> Path | bytes:
        content = self.encoded[row].as_py()
        if content is not None:
            return bytes(content)
        path = None if self.paths is None else self.paths[row].as_py()
        if not path:
            raise DataError(f"{self.where(row)}: the image is null: expected the bytes of an image file")
        return Path(path)

    def open(self, row: int) -> Image.Image:
        """One image, its size and mode known."""
        return open_image(self._source(row), self.where(row))

    def read(self, row: int, input: Input) -> Pixels:
        """One image, decoded and fitted."""
        return read_image(self._source(row), input, self.where(row))


@dataclass(frozen=True)
class Records:
    """Undecoded images with their labels.

    Attributes:
        store: Where the images are.
        labels: Class of each image, int64, shape (N,).
        classes: Names of the classes.
        rows: Row in the store of each image, int64, shape (N,).
    """

    store: Store
    labels: Indices
    classes: tuple[str, ...]
    rows: Indices

    def __post_init__(self) -> None:
        """Check the labels.

        Raises:
            DataError: A label names no class.
        """
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(wrong):
            raise DataError(
                f"{self.where(int(wrong[0]))}: label {self.labels[wrong[0]]} is out of range: "
                f"expected 0 to {len(self.classes) - 1}, one of {len(self.classes)} classes"
            )

    @classmethod
    def whole(cls, store: Store, labels: Indices, classes: tuple[str, ...]) -> Self:
        """All images of a store, in order."""
        return cls(store, labels, classes, np.arange(len(labels)))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def where(self, index: int) -> str:
        """Names one image in an error message."""
        return self.store.where(int(self.rows[index]))

    def open(self, index: int) -> Image.Image:
        """One image, its size and mode known."""
        return self.store.open(int(self.rows[index]))

    def read(self, index: int, input: Input) -> Pixels:
        """One image, decoded and fitted: uint8, shape (H, W, C)."""
        return self.store.read(int(self.rows[index]), input)

    def select(self, indices: Indices) -> Self:
        """Some of the images, in the order given."""
        return type(self)(self.store, self.labels[indices], self.classes, self.rows[indices])

    def relabelled(self, labels: Indices, classes: tuple[str, ...]) -> Self:
        """The same images under other labels."""
        return type(self)(self.store, labels, classes, self.rows)


def evenly(count: int, most: int) -> Indices:
    """Up to `most` indices, evenly spaced over `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)) if count else np.zeros(0, np.int64)


def join(names: Sequence[str], arrays: Sequence[Pixels]) -> RawStore:
    """One store of several arrays of pixels.

    Args:
        names: What to call the file of each array.
        arrays: uint8, shape (N, H, W, C) each.

    Returns:
        The store.
    """
    return RawStore(np.concatenate(list(arrays)), Parts(tuple(names), tuple(len(array) for array in arrays)))
