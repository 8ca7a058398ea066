"""Where kernels lie among bytes of which nothing is known: a firmware image, a library, the file of another runtime.

The signs of 32 neighbouring numbers are 32 bits that stay the same when a kernel is scaled, as folding batch norm does, or
rounded to fewer bits. A few such windows of every kernel, in every order that a runtime is known to lay it in, are looked up at
every byte; where one is found, the whole kernel is read there and compared number by number.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dacnn.measure.copies import Difference, difference_between
from dacnn.measure.orders import Order, orders_of
from dacnn.measure.stored import StoredArray, is_trivial

# N bytes, L numbers of a kernel as they lie, K windows

Bytes = NDArray[np.uint8]

# signs that are looked up at once, how many of them must be of numbers, and how many of either kind: zeros and rows of equal
# signs are everywhere
_WINDOW, _SIGNS, _EACH_SIGN = 32, 16, 6
_ALL = (1 << _WINDOW) - 1
# parts of a kernel from each of which a window is taken, and how many numbers are looked at for the best one: many parts, since
# a window in which some channels have a negative scale and some have not is not found
_WINDOWS, _LOOKED_AT = 12, 4096
# share of a channel's signs that must agree before a whole kernel is compared, and how many are looked at
_AGREE, _SAMPLED = 0.9, 256
_TABLE_BITS = 17
# of the bytes, at once
_CHUNK = 1 << 20
# types by their size in bytes; those of one byte are told apart by where their zero is
_TYPES = {4: ("float32",), 2: ("bfloat16", "float16"), 1: ("int8", "uint8")}


@dataclass(frozen=True, eq=False)
class Found:
    """A copy of a kernel.

    Attributes:
        kernel: Index of the kernel.
        start: Its first byte.
        end: Behind its last byte.
        array: Its numbers, in the usual order.
        difference: How they differ from the kernel, the order among it.
    """

    kernel: int
    start: int
    end: int
    array: StoredArray
    difference: Difference


@dataclass(frozen=True, eq=False)
class _Kernel:
    """A kernel, and how strong each of its numbers is.

    Attributes:
        index: Of the kernel.
        array: The kernel.
        rows: How many output channels it has, of all kernels of a bank.
        numbers: All of it, shape (number of them,).
        strength: Magnitudes as shares of the largest of the output channel, likewise: what is weak loses its sign in rounding.
    """

    index: int
    array: StoredArray
    rows: int
    numbers: NDArray[np.float32]
    strength: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Window:
    """Numbers of a kernel in an order.

    Attributes:
        kernel: The kernel.
        order: The order.
        length: Numbers of the order.
        at: Which of them is its first.
        keys: Signs, the first number's lowest: as they are; those of the kernel's numbers turned, as by a negative scale; all
            turned, as where 128 stands for zero.
        sample: Numbers of the order that are of one output channel, whose signs are all as they were or all turned.
        negative: Which of them are below zero.
    """

    kernel: _Kernel
    order: Order
    length: int
    at: int
    keys: tuple[int, int, int]
    sample: NDArray[np.intp]
    negative: NDArray[np.bool_]


def _dimensions_of_rows(array: StoredArray) -> int:
    """How many dimensions stand for output channels: in a bank of kernels, whose they are, too."""
    return max(array.values.ndim - 3, 1)


def _prepared(index: int, array: StoredArray) -> _Kernel:
    rows = array.values.reshape(math.prod(array.values.shape[: _dimensions_of_rows(array)]), -1).astype(np.float32)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    strength = np.divide(np.abs(rows), largest, out=np.zeros_like(rows), where=largest > 0)
    return _Kernel(index, array, len(rows), rows.ravel(), strength.ravel())


def _windows(kernel: _Kernel) -> Iterator[_Window]:
    """The windows by which a kernel is found, of every order.

    Of each part those in one output channel come first, which a negative scale turns as a whole, then those whose weakest
    number is strongest.
    """
    row = kernel.numbers.size // kernel.rows
    for order in orders_of(kernel.array.values.shape):
        indices = order.indices
        count, channels = len(indices), indices // row
        parts = min(_WINDOWS, max(count // _WINDOW, 1))
        for part in range(parts):
            first = count * part // parts
            some = indices[first : min(first + _LOOKED_AT, count * (part + 1) // parts)]
            if len(some) >= _WINDOW and (best := _best(kernel, some, row)) is not None:
                at, keys = best
                inside = channels[first + at : first + at + _WINDOW]
                # some of it may fill a block, which is no channel's
                sample = np.flatnonzero(channels == inside[inside >= 0][0])
                # the stronger half: what is weak may have lost its sign in rounding
                sample = sample[np.argsort(-kernel.strength[indices[sample]])][: min((len(sample) + 1) // 2, _SAMPLED)]
                negative = kernel.numbers[indices[sample]] < 0
                yield _Window(kernel, order, count, first + at, keys, sample, negative)


def _best(kernel: _Kernel, indices: NDArray[np.int32], row: int) -> tuple[int, tuple[int, int, int]] | None:
    """The best place for a window among some numbers of an order, and its keys; None where there is none."""
    numbers = kernel.numbers[indices]
    # what fills a block is zero and known to be, as is a kernel's own zero: neither has a sign to turn
    has_sign = (indices >= 0) & (numbers != 0)
    weakest = _window_view(np.where(has_sign, kernel.strength[indices], 1)).min(axis=1)
    signs = _window_view(has_sign & (numbers < 0))
    # of the numbers alone: zeros and a few signs are everywhere
    negative = np.count_nonzero(signs, axis=1)
    positive = np.count_nonzero(_window_view(has_sign), axis=1) - negative
    is_mixed = (negative >= _EACH_SIGN) & (positive >= _EACH_SIGN) & (negative + positive >= _SIGNS)
    channels = _window_view(indices // row)
    in_one = channels.min(axis=1) == channels.max(axis=1)
    best = int(np.where(is_mixed, weakest + in_one, -1).argmax())
    if not is_mixed[best]:
        return None
    key, with_sign = _as_bits(signs[best]), _as_bits(has_sign[best : best + _WINDOW])
    return best, (key, key ^ with_sign, key ^ _ALL)


def _window_view(values: NDArray[Any]) -> NDArray[Any]:
    view: NDArray[Any] = np.lib.stride_tricks.sliding_window_view(values, _WINDOW)
    return view


def _as_bits(bools: NDArray[np.bool_]) -> int:
    return int(np.packbits(bools, bitorder="little").view(np.uint32)[0])


def _keys(data: Bytes, size: int, step: int) -> NDArray[np.uint32]:
    """The signs of as many neighbouring numbers as a window has.

    Args:
        data: Shape (N,).
        size: Bytes of a number; its sign is the highest bit of the last one.
        step: Bytes from one beginning to the next: 1 or `size`.

    Returns:
        A key for every beginning.
    """
    keys = (data[size - 1 :: step] >> 7).astype(np.uint32)
    have, apart = 1, size // step
    while have < _WINDOW:
        keys = keys[: -apart * have] | keys[apart * have :] << np.uint32(have)
        have *= 2
    return keys


def _hashed(keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Keys spread over the table, those of equal signs in a row among them, which most of any memory is."""
    return keys * np.uint32(0x9E3779B1) >> np.uint32(32 - _TABLE_BITS)


class _Index:
    """Windows by their keys."""

    def __init__(self, windows: Sequence[_Window]) -> None:
        keys = np.array([key for window in windows for key in window.keys], np.uint32)
        self.windows = [window for window in windows for _ in window.keys]
        self.order = np.argsort(keys, kind="stable")
        self.keys = keys[self.order]
        # most of what is looked up is ruled out by a table of single bits
        self.table = np.zeros(1 << _TABLE_BITS, bool)
        self.table[_hashed(keys)] = True

    def found(self, keys: NDArray[np.uint32]) -> Iterator[tuple[int, _Window]]:
        """Places in `keys`, and the windows that have such a key."""
        places = np.flatnonzero(self.table[_hashed(keys)])
        wanted = keys[places]
        first = np.searchsorted(self.keys, wanted)
        last = np.searchsorted(self.keys, wanted, side="right")
        for place, start, end in zip(*(x[last > first].tolist() for x in (places, first, last)), strict=True):
            for index in self.order[start:end].tolist():
                yield place, self.windows[index]


def _numbers(data: Bytes, dtype: str) -> NDArray[np.float32]:
    """Bytes as numbers of a type, any of which a float32 holds."""
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "uint8":
        return data.astype(np.float32) - 128
    return data.view(np.dtype(dtype)).astype(np.float32)


def _read(data: Bytes, start: int, window: _Window, size: int) -> Found | None:
    """The copy of a window's kernel that begins at a byte, if one does."""
    turned = np.count_nonzero(data[start + window.sample * size + size - 1] >> 7 != window.negative)
    if min(turned, len(window.sample) - turned) > (1 - _AGREE) * len(window.sample):
        return None
    kernel, indices = window.kernel, window.order.indices
    end = start + len(indices) * size
    filled = indices >= 0
    block = np.array(data[start:end])
    for dtype in _TYPES[size]:
        values = np.empty(kernel.array.values.size, np.float32)
        values[indices[filled]] = _numbers(block, dtype)[filled]
        if not np.isfinite(values).all():
            continue
        shaped = values.reshape(kernel.array.values.shape)
        array = StoredArray((f"byte {start}",), "bytes", shaped.astype(np.int16) if size == 1 else shaped, dtype, end - start)
        difference = _difference(kernel.array, array)
        if difference is None and size == 1:
            difference = _without_own(kernel.array, array)
        if difference is not None:
            return Found(kernel.index, start, end, array, _with(difference, window.order.words, layout=True))
    return None


def _difference(kernel: StoredArray, array: StoredArray) -> Difference | None:
    """How an array of a kernel's shape differs from it; in a bank, each output channel of each kernel has its own scale."""
    one, other = (
        replace(each, values=each.values.reshape(-1, *each.values.shape[_dimensions_of_rows(each) :]))
        for each in (kernel, array)
    )
    return difference_between(one, other)


def _without_own(kernel: StoredArray, array: StoredArray) -> Difference | None:
    """How an array differs from a kernel but for what each channel takes of itself at the centre, which integers hold apart."""
    outputs, inputs, *sides = kernel.values.shape[_dimensions_of_rows(kernel) - 1 :]
    if outputs != inputs or not sides:
        return None
    alike = []
    for each in (kernel, array):
        values = each.values.copy()
        values[(..., np.arange(outputs), np.arange(outputs), *(side // 2 for side in sides))] = 0
        alike.append(replace(each, values=values))
    difference = _difference(*alike)
    return difference and _with(difference, "each channel's own weight apart")


def _with(difference: Difference, words: str, layout: bool = False) -> Difference:
    if not words:
        return difference
    others = tuple(word for word in difference.words if word != "exact")
    return Difference((*others, words), words if layout else difference.layout)


class KernelSearch:
    """Looks for some kernels among bytes.

    Attributes:
        looked_for: Indices of those that can be told from other bytes; others say nothing of their own, or hold few signs.
    """

    def __init__(self, kernels: Sequence[StoredArray]) -> None:
        """Choose what to look up.

        Args:
            kernels: The kernels: output channels, input channels, sides; of a bank, with one dimension more in front. What says
                nothing of its own, such as an identity, is not looked for.
        """
        prepared = [_prepared(index, array) for index, array in enumerate(kernels) if not is_trivial(array.values)]
        windows = [window for kernel in prepared for window in _windows(kernel)]
        self._index = _Index(windows)
        self.looked_for = frozenset(window.kernel.index for window in windows)

    def find(self, data: Bytes, aligned: bool = False) -> list[Found]:
        """Find every copy.

        Args:
            data: The bytes, shape (N,).
            aligned: Whether numbers lie at multiples of their size, as they do in memory; a file may lay them anywhere.

        Returns:
            The copies, in the order of the bytes.
        """
        found: list[Found] = []
        for size in _TYPES:
            step = size if aligned else 1
            tried: set[tuple[int, Order, int]] = set()
            for first in range(0, len(data), _CHUNK):
                chunk = np.asarray(data[first : first + _CHUNK + size * _WINDOW - 1])
                if len(chunk) < size * _WINDOW:
                    break
                if not chunk.any():
                    continue
                for place, window in self._index.found(_keys(chunk, size, step)):
                    start = first + place * step - window.at * size
                    end = start + window.length * size
                    key = (window.kernel.index, window.order, start)
                    if start < 0 or end > len(data) or key in tried:
                        continue
                    tried.add(key)
                    # most are other places of a copy that is found already
                    if not _overlaps(window.kernel.index, start, end, found) and (copy := _read(data, start, window, size)):
                        found.append(copy)
        return sorted(found, key=lambda copy: copy.start)


def _overlaps(kernel: int, start: int, end: int, found: Sequence[Found]) -> bool:
    return any(kernel == other.kernel and start < other.end and other.start < end for other in found)
