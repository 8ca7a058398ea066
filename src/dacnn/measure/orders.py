"""The orders in which runtimes lay the numbers of a kernel into memory, as the indices of its numbers one behind the other."""

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# O output channels, I input channels, S = H x W places, L numbers as they lie, those that fill blocks included

# Names of dimensions: O and I are blocks of channels, o what is in a block of outputs, i and q what is in one of inputs: q lie
# beside each other, i of those. S are the places of the kernel, row by row.
_PLAIN = (("", "OIS"), ("transposed", "IOS"), ("channels last", "OSI"), ("HWIO", "SIO"), ("HWOI", "SOI"))
# Outputs of a block, inputs of a block, neighbouring inputs, and the order.
_BLOCKED = (
    *((block, 1, 1, "OSIo") for block in (64, 48, 32, 24, 16, 8, 4)),  # ours, and oneDNN's since it multiplies matrices
    *((block, 1, 1, "OISo") for block in (16, 8, 4)),  # ONNX Runtime's, for few inputs and depthwise
    *((block, block, 1, "OISio") for block in (16, 8, 4)),  # ONNX Runtime's, older ones of oneDNN, ncnn's
    (16, 4, 4, "OSIoq"),  # ours of int8
    *((16, 16, quad, "OISioq") for quad in (4, 2)),  # oneDNN's of int8 and bfloat16
    *((block, quad, quad, "OSIoq") for block in (64, 48, 32, 16) for quad in (4, 2)),
)
# dimensions of a bank of kernels
_BANK = 5
# of the image that a linear layer's features may be
_SIDES = range(2, 9)
# orders whose indices are kept: those of one kernel that are looked at in turn
_KEPT = 16


@dataclass(frozen=True)
class Order:
    """One order of a kernel.

    Attributes:
        shape: Of the kernel.
        words: What it is called: `transposed`, `channels last`, `HWIO`, `blocked by 16`, ...; empty for the usual one.
        dimensions: Names of its dimensions, the outermost first.
        outputs: Output channels of a block.
        inputs: Input channels of a block.
        quad: Of those, how many lie beside each other.
        filled: Whether the last block of outputs is filled up with zeros, rather than as narrow as what is left.
        side: Of the image that the features of a linear layer are, which then lies pixel by pixel; 1: they are none.
    """

    shape: tuple[int, ...]
    words: str
    dimensions: str
    outputs: int = 1
    inputs: int = 1
    quad: int = 1
    filled: bool = False
    side: int = 1

    @property
    def indices(self) -> NDArray[np.int32]:
        """Shape (L,): which number of the kernel lies there; -1 where none does, to fill a block. Made anew each time."""
        return _indices(self)


@functools.lru_cache(maxsize=_KEPT)
def _indices(order: Order) -> NDArray[np.int32]:
    if len(order.shape) == _BANK:
        size = math.prod(order.shape[1:])
        one = _indices(replace(order, shape=order.shape[1:]))
        parts = [np.where(one >= 0, one + np.int32(size * template), np.int32(-1)) for template in range(order.shape[0])]
        return np.concatenate(parts)
    outputs, inputs = order.shape[:2]
    numbers = np.arange(math.prod(order.shape), dtype=np.int32).reshape(outputs, inputs, -1)
    if order.side > 1:
        numbers = numbers.reshape(outputs, -1, order.side**2).transpose(0, 2, 1).reshape(numbers.shape)
    if left := -inputs % order.inputs:
        numbers = np.pad(numbers, ((0, 0), (0, left), (0, 0)), constant_values=-1)
    if left := -outputs % order.outputs:
        # -2 is taken out again
        numbers = np.pad(numbers, ((0, left), (0, 0), (0, 0)), constant_values=-1 if order.filled else -2)
    places, each = numbers.shape[2], order.inputs // order.quad
    blocks = numbers.reshape(-1, order.outputs, numbers.shape[1] // order.inputs, each, order.quad, places)
    all_dimensions = "OoIiqS"
    present = [all_dimensions.index(name) for name in order.dimensions]
    absent = [axis for axis in range(6) if axis not in present]
    assert all(blocks.shape[axis] == 1 for axis in absent), "a block whose dimension has no place in the order"
    indices = np.ascontiguousarray(blocks.transpose(*present, *absent)).ravel()
    return indices[indices != -2] if left and not order.filled else indices


def orders_of(shape: tuple[int, ...]) -> Iterator[Order]:
    """Every known order of a kernel, each once, the likeliest first.

    Args:
        shape: Of the kernel: output channels, input channels of a group, and the sides if there are any; of a bank of kernels
            with one dimension more in front, which lie one behind the other.

    Yields:
        The orders.
    """
    if len(shape) == _BANK:
        for order in orders_of(shape[1:]):
            yield replace(order, shape=shape)
        return
    seen: set[bytes] = set()
    for order in _all(shape):
        indices = order.indices
        key = hashlib.blake2b(indices.data, digest_size=16).digest()
        # no runtime fills more than it stores
        if key not in seen and len(indices) <= 2 * math.prod(shape):
            seen.add(key)
            yield order


def _all(shape: tuple[int, ...]) -> Iterator[Order]:
    for words, dimensions in _PLAIN:
        yield Order(shape, words, dimensions)
    for outputs, inputs, quad, dimensions in _BLOCKED:
        yield from _both_ends(Order(shape, f"blocked by {outputs}", dimensions, outputs, inputs, quad))
    for side in _SIDES if math.prod(shape[2:]) == 1 else ():
        channels, left = divmod(shape[1], side * side)
        if channels > 1 and not left:
            for words, dimensions in (("channels last", "OIS"), ("transposed channels last", "IOS")):
                yield Order(shape, words, dimensions, side=side)
            for inputs, quad, dimensions in ((1, 1, "OSIo"), (4, 4, "OSIoq")):
                yield from _both_ends(Order(shape, "blocked by 16 channels last", dimensions, 16, inputs, quad, side=side))


def _both_ends(order: Order) -> Iterator[Order]:
    """The last block of outputs as narrow as what is left, and filled with zeros."""
    yield order
    if order.shape[0] % order.outputs:
        yield replace(order, filled=True)
