"""The orders in which runtimes lay the numbers of a kernel into memory, as the indices of its numbers one behind the other."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# O output channels, I input channels, S = H x W places, L numbers as they lie, those that fill blocks included

# Names of dimensions: O and I are blocks of channels, o what is in a block of outputs, i and q what is in one of inputs: q lie
# beside each other, i of those. S are the places of the kernel, row by row.
_PLAIN = (("", "OIS"), ("transposed", "IOS"), ("channels last", "OSI"), ("HWIO", "SIO"), ("HWOI", "SOI"))
# Blocks of outputs, of inputs, of neighbouring inputs, and the order.
_BLOCKED = (
    *((block, 1, 1, "OSIo") for block in (64, 48, 32, 24, 16, 8, 4)),  # ours, and oneDNN's since it multiplies matrices
    *((block, 1, 1, "OISo") for block in (16, 8, 4)),  # ONNX Runtime's, for few inputs and depthwise
    *((block, block, 1, "OISio") for block in (16, 8, 4)),  # ONNX Runtime's, older ones of oneDNN, ncnn's
    (16, 1, 4, "OSIoq"),  # ours of int8
    *((16, 16, quad, "OISioq") for quad in (4, 2)),  # oneDNN's of int8 and bfloat16
    *((block, 1, quad, "OSIoq") for block in (64, 48, 32, 16) for quad in (4, 2)),
)
# dimensions of a bank of kernels
_BANK = 5
# of the image that a linear layer's features may be
_SIDES = range(2, 9)


@dataclass(frozen=True, eq=False)
class Order:
    """One order.

    Attributes:
        words: What it is called: `transposed`, `channels last`, `HWIO`, `blocked by 16`, ...; empty for the usual one.
        indices: Shape (L,): which number of the kernel lies there; -1 where none does, to fill a block.
    """

    words: str
    indices: NDArray[np.int32]


def _blocked(numbers: NDArray[np.int32], outputs: int, inputs: int, quad: int, dimensions: str) -> NDArray[np.int32]:
    """Indices in blocks; what fills the last block of inputs is -1, of outputs -2.

    Args:
        numbers: Indices, shape (O, I, S).
        outputs: Output channels in a block.
        inputs: Input channels in a block, in units of `quad`.
        quad: Neighbouring input channels.
        dimensions: Their names in order.
    """
    inputs = max(inputs // quad, 1)
    count_o, count_i, places = numbers.shape
    filled = numbers
    if left := -count_i % (inputs * quad):
        filled = np.pad(filled, ((0, 0), (0, left), (0, 0)), constant_values=-1)
    if left := -count_o % outputs:
        filled = np.pad(filled, ((0, left), (0, 0), (0, 0)), constant_values=-2)
    parts = filled.reshape(-1, outputs, filled.shape[1] // (inputs * quad), inputs, quad, places)
    all_dimensions = "OoIiqS"
    present = [all_dimensions.index(name) for name in dimensions]
    absent = [axis for axis in range(6) if axis not in present]
    assert all(parts.shape[axis] == 1 for axis in absent), "a block whose dimension has no place in the order"
    return parts.transpose(*present, *absent).ravel()


def orders_of(shape: tuple[int, ...]) -> Iterator[Order]:
    """Every known order of a kernel, each once, the likeliest first.

    Args:
        shape: Of the kernel: output channels, input channels of a group, and the sides if there are any; of a bank of kernels
            with one dimension more in front, which lie one behind the other.

    Yields:
        The orders.
    """
    if len(shape) == _BANK:
        size = math.prod(shape[1:])
        for order in orders_of(shape[1:]):
            parts = [np.where(order.indices >= 0, order.indices + size * template, -1) for template in range(shape[0])]
            yield Order(order.words, np.concatenate(parts).astype(np.int32))
        return
    outputs, inputs = shape[:2]
    numbers = np.arange(np.prod(shape), dtype=np.int32).reshape(outputs, inputs, -1)
    seen: set[bytes] = set()
    for words, indices in _all(numbers):
        key = hashlib.blake2b(indices.data, digest_size=16).digest()
        # no runtime fills more than it stores
        if key not in seen and len(indices) <= 2 * numbers.size:
            seen.add(key)
            yield Order(words, indices)


def _all(numbers: NDArray[np.int32]) -> Iterator[tuple[str, NDArray[np.int32]]]:
    for words, dimensions in _PLAIN:
        yield words, _plain(numbers, dimensions)
    for outputs, inputs, quad, dimensions in _BLOCKED:
        yield from _both_ends(numbers, outputs, inputs, quad, dimensions)
    count_o, count_i, places = numbers.shape
    for side in _SIDES if places == 1 else ():
        channels, left = divmod(count_i, side * side)
        if channels > 1 and not left:
            of_image = numbers.reshape(count_o, channels, -1).transpose(0, 2, 1).reshape(numbers.shape)
            for words, indices in (("", _plain(of_image, "OIS")), ("transposed", _plain(of_image, "IOS"))):
                yield f"{words} channels last".strip(), indices
            for blocks in ((16, 1, 1, "OSIo"), (16, 1, 4, "OSIoq")):
                for words, indices in _both_ends(of_image, *blocks):
                    yield f"{words} channels last", indices


def _plain(numbers: NDArray[np.int32], dimensions: str) -> NDArray[np.int32]:
    return np.ascontiguousarray(numbers.transpose(*("OIS".index(name) for name in dimensions))).ravel()


def _both_ends(
    numbers: NDArray[np.int32], outputs: int, inputs: int, quad: int, dimensions: str
) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """The last block of outputs as narrow as what is left, and filled with zeros."""
    indices = _blocked(numbers, outputs, inputs, quad, dimensions)
    yield f"blocked by {outputs}", indices[indices != -2] if len(numbers) % outputs else indices
    if len(numbers) % outputs:
        yield f"blocked by {outputs}", np.maximum(indices, -1)
