"""Winograd's convolution F(4x4, 3x3): its points, the kernel in its domain, where it pays, and what memory it takes.

Six products for four outputs of three taps, in two dimensions 36 for 16 instead of 144. The polynomials are read at 0, ±√½, ±√2
and infinity: a quarter of the error of 0, ±1, ±2 (largest error 1.3e-6 against 5.6e-6 of the largest output on 128 channels).

Source:
    Lavin and Gray, CVPR 2016, arXiv:1509.09308. Deviations: the points.
"""

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.c.calls import Geometry

# O output channels, I input channels

Array = NDArray[np.float32]

SMALL_POINT = 0.5**0.5
LARGE_POINT = 2**0.5
# tiles that are transformed at once: their values and sums stay in a second-level cache of 512 KiB at 128 channels
TILES = 16
_OUTPUTS = 32
_LINE = 16
_POSITIONS = 36
# so many times fewer products make up for the transforms
_WORTH = 1.3

# G: kernel to its values at the points, each divided by what the interpolation would divide by
_KERNEL = np.array(
    [
        [1, 0, 0],
        *([point**power * -2 / 3 for power in range(3)] for point in (SMALL_POINT, -SMALL_POINT)),
        *([point**power / 6 for power in range(3)] for point in (LARGE_POINT, -LARGE_POINT)),
        [0, 0, 1],
    ]
)


def pays(of: Geometry, stored: bool) -> bool:
    """Whether the fast code should take this convolution for a layer, by the products that it saves.

    Args:
        of: The layer's sizes.
        stored: Whether the kernel is stored, so that it is transformed once; else it is in every call.
    """
    same = (of.kernel_h, of.kernel_w, of.stride_h, of.stride_w, of.dilation_h, of.dilation_w, of.groups) == (
        3,
        3,
        1,
        1,
        1,
        1,
        1,
    )
    tiles = -(-of.out_h // 4) * -(-of.out_w // 4)
    direct = 9 * of.out_h * of.out_w
    # products are made for four tiles at once; transforms of images weigh on few channels, those of kernels on few pixels
    needed = _POSITIONS * (-(-tiles // 4) * 4) + (0 if stored else 2 * _POSITIONS)
    return same and min(of.in_c, of.out_c) >= 16 and _WORTH * needed < direct


def transformed(kernel: Array) -> Array:
    """A kernel in the domain of the convolution, as C's `transform_kernel` gives it, but computed in float64.

    Args:
        kernel: Shape (O, I, 3, 3).

    Returns:
        Shape (`transformed_floats`,): [block of 16 outputs][36 positions][I][16], the last block filled with zeros.
    """
    outputs, inputs = kernel.shape[:2]
    values = np.einsum("ax,oixy,by->aboi", _KERNEL, kernel.astype(np.float64), _KERNEL)
    values = np.pad(values.reshape(_POSITIONS, outputs, inputs), ((0, 0), (0, -outputs % 16), (0, 0)))
    blocks = values.reshape(_POSITIONS, -1, 16, inputs).transpose(1, 0, 3, 2)
    return np.ascontiguousarray(blocks, dtype=np.float32).ravel()


def transformed_floats(in_c: int, out_c: int) -> int:
    """Numbers of a kernel in the domain of the convolution."""
    return _POSITIONS * in_c * _round_up(out_c)


def scratch_floats(in_c: int) -> int:
    """Numbers of the scratch of `convolve_winograd_ISA`, for any size of the image and any number of output channels."""
    return _LINE + _POSITIONS * (TILES * (_round_up(in_c) + _OUTPUTS) + 2 * _LINE)


def _round_up(channels: int) -> int:
    return -(-channels // 16) * 16
