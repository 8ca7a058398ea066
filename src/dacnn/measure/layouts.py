"""The ways in which an array may lie in memory, each read as rows of one output or one input channel.

# O output channels, I input channels, H rows, W columns, B channels in a block
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Axis = Literal["output", "input"]

# Block sizes that ONNX Runtime uses, by the width of the CPU's vector registers. The larger one comes first: what is blocked by
# 16 and half padding reads as blocked by 8, too.
BLOCKS = (16, 8)
# where the dimensions that must be rows and columns of a kernel are larger, the layout is not meant
_LARGEST_SIDE = 32


@dataclass(frozen=True, eq=False)
class Rows:
    """An array read in one layout, as a matrix whose rows are its output or its input channels.

    Attributes:
        layout: `""` as declared, `channels last` (OHWI), `HWIO`, `blocked by 8`, `blocked by 16`.
        axis: Whose channels are the rows; a row's numbers then run over the other channels, H and W.
        view: The array with the row dimensions first, then those of the other channels, then H and W.
        split: How many dimensions each kind of channel takes: rows, other channels.
        rows: Number of rows, without the zeros that fill the last block.
        channels: Number of other channels, likewise.
    """

    layout: str
    axis: Axis
    view: NDArray[Any]
    split: tuple[int, int]
    rows: int
    channels: int

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self.channels * math.prod(self.view.shape[sum(self.split) :])

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Copy some rows.

        Args:
            indices: Which, shape (R,).

        Returns:
            Shape (R, columns).
        """
        rows = _pick(self.view, self.split[0], indices)
        spatial = math.prod(self.view.shape[sum(self.split) :])
        return rows.reshape(len(indices), -1, spatial)[:, : self.channels].reshape(len(indices), -1).astype(np.float64)


def _pick(view: NDArray[Any], dimensions: int, indices: NDArray[np.int64]) -> NDArray[Any]:
    picked: NDArray[Any] = view[np.unravel_index(indices, view.shape[:dimensions])]
    return picked


def _without_padding(view: NDArray[Any], dimensions: int) -> int:
    """How many channels there are up to the last one that is not all zero."""
    count = math.prod(view.shape[:dimensions])
    while count > 1 and not np.any(_pick(view, dimensions, np.array([count - 1]))):
        count -= 1
    return count


def _both_axes(layout: str, view: NDArray[Any], outputs: int, inputs: int) -> Iterator[Rows]:
    """A layout's two readings, of a view whose dimensions are those of O, then of I, then H and W."""
    swapped = np.moveaxis(view, range(outputs, outputs + inputs), range(inputs))
    count_out, count_in = _without_padding(view, outputs), _without_padding(swapped, inputs)
    yield Rows(layout, "output", view, (outputs, inputs), count_out, count_in)
    yield Rows(layout, "input", swapped, (inputs, outputs), count_in, count_out)


def _blocked(array: NDArray[Any]) -> Iterator[Rows]:
    """ONNX Runtime's filters: [O/B][I/B][H][W][Bi][Bo], and [O/B][I][H][W][Bo] for few input channels and depthwise."""
    outputs, inputs, height, width = array.shape
    flat = np.ascontiguousarray(array)
    for block in BLOCKS:
        if outputs % block:
            continue
        one = flat.reshape(outputs // block, inputs, height, width, block)
        yield from _both_axes(f"blocked by {block}", one.transpose(0, 4, 1, 2, 3), 2, 1)
        if inputs % block == 0:
            two = flat.reshape(outputs // block, inputs // block, height, width, block, block)
            yield from _both_axes(f"blocked by {block}", two.transpose(0, 5, 1, 4, 2, 3), 2, 2)


def _flattened_blocks(array: NDArray[Any]) -> NDArray[Any] | None:
    """An array whose blocks are dimensions of their own, in the four dimensions that it stands for."""
    shape = array.shape
    if array.ndim == 6 and shape[4] == shape[5] and shape[5] in BLOCKS:
        return array.reshape(shape[0] * shape[5], shape[1] * shape[4], shape[2], shape[3])
    if array.ndim == 5 and shape[4] in BLOCKS:
        return array.reshape(shape[0] * shape[4], *shape[1:4])
    return None


def readings(array: NDArray[Any], blocked: bool = False) -> Iterator[Rows]:
    """Every way in which an array may be meant, the likeliest first.

    Args:
        array: An array of two or more dimensions.
        blocked: Whether it is known that its channels are blocked.

    Yields:
        The readings.
    """
    if not blocked:
        yield from _both_axes("", array, 1, 1)
        if 3 <= array.ndim <= 5:
            if max(array.shape[1:-1]) <= _LARGEST_SIDE:
                yield from _both_axes("channels last", np.moveaxis(array, -1, 1), 1, 1)
            if max(array.shape[:-2]) <= _LARGEST_SIDE:
                yield from _both_axes("HWIO", np.moveaxis(array, (-1, -2), (0, 1)), 1, 1)
    if array.ndim == 4:
        yield from _blocked(array)
    elif (flat := _flattened_blocks(array)) is not None:
        yield from _blocked(flat)
