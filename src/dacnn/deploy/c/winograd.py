"""Winograd's convolution F(4x4, 3x3) in C: the kernel in its domain, where it pays, and what memory it takes.

The same points as a training's (`dacnn.sharing.winograd`), and the same source; the products are the C code's own.
"""

import numpy as np
from numpy.typing import NDArray

from dacnn.sharing.winograd import KERNEL_TO_POINTS

# O output channels, I input channels

Array = NDArray[np.float32]

# tiles that are transformed at once: their values and sums stay in a second-level cache of 512 KiB at 128 channels
TILES = 16
_OUTPUTS = 32
_LINE = 16
_POSITIONS = 36
# products that are saved, as a factor, from where on transforms cost less than that: with few channels they are the larger part
_SAVED = 1.5
_SAVED_NARROW = 3.0
_NARROW = 16
# time of a kernel's transform, 0.14 ms at 128 x 128 channels, in products of an input with an output channel
_TRANSFORM = 500
# a kernel of 16 MiB comes from beyond the caches; few tiles cannot pay for that
_LARGE_FLOATS = 4 * 1024 * 1024
_LARGE_TILES = 9


def winograd_pays(in_c: int, out_c: int, out_h: int, out_w: int, *, computed: bool = False) -> bool:
    """Whether Winograd's convolution is the faster one for a 3x3 kernel with stride 1, dilation 1 and one group.

    Measured on one core (AMD EPYC with AVX-512), AVX-512 and AVX2 code, against the direct convolution at 128 channels: 3.2
    times as fast at 8x8 pixels, 1.4 times at 5x5 and 9x9, 0.8 times at 4x4, where it reads four times the kernel for one tile.

    Args:
        in_c: Input channels.
        out_c: Output channels.
        out_h: Rows of the output before pooling.
        out_w: Columns likewise.
        computed: Whether the kernel is computed, and so transformed, every time: then it takes 16x16 pixels.
    """
    tiles = -(-out_h // 4) * -(-out_w // 4)
    # tiles are multiplied in fours
    products = _POSITIONS * -(-tiles // 4) * 4 + (_TRANSFORM if computed else 0)
    saved = 9 * out_h * out_w / products
    large = transformed_floats(in_c, out_c) > _LARGE_FLOATS
    return saved >= (_SAVED_NARROW if min(in_c, out_c) < _NARROW else _SAVED) and (tiles >= _LARGE_TILES or not large)


def transformed(kernel: Array) -> Array:
    """A kernel in the domain of the convolution, as C's `transform_kernel` gives it, but computed in float64.

    Args:
        kernel: Shape (O, I, 3, 3).

    Returns:
        Shape (`transformed_floats`,): [block of 16 outputs][36 positions][I][16], the last block filled with zeros.
    """
    outputs, inputs = kernel.shape[:2]
    values = np.einsum("ax,oixy,by->aboi", KERNEL_TO_POINTS, kernel.astype(np.float64), KERNEL_TO_POINTS)
    values = np.pad(values.reshape(_POSITIONS, outputs, inputs), ((0, 0), (0, -outputs % 16), (0, 0)))
    blocks = values.reshape(_POSITIONS, -1, 16, inputs).transpose(1, 0, 3, 2)
    return np.ascontiguousarray(blocks, dtype=np.float32).ravel()


def transformed_floats(in_c: int, out_c: int) -> int:
    """Numbers of a kernel in the domain of the convolution."""
    return _POSITIONS * in_c * _round_up(out_c)


def scratch_floats(in_c: int) -> int:
    """Numbers of the scratch that `convolve_winograd_ISA` takes, however large the image and however many the outputs."""
    return _LINE + _POSITIONS * (TILES * (_round_up(in_c) + _OUTPUTS) + 2 * _LINE)


def _round_up(channels: int) -> int:
    return -(-channels // 16) * 16
