"""int8 kernels in the order in which the C code reads them."""

import numpy as np

from dacnn.deploy.c.calls import Geometry
from dacnn.deploy.integers.program import Int8
from dacnn.deploy.program import Convolve

# O output channels, I input channels, H rows, W columns

BLOCK = 16
# a vector of 64 bytes may begin at the last step of a narrow block
SLACK = 64
_POSITIONS = 36
# products that are saved, as a factor, from where on transforms cost less than that
_SAVED = 1.5


def is_depthwise(out_channels: int, inputs: int, groups: int) -> bool:
    """Whether each channel is convolved by itself."""
    return groups > 1 and inputs == 1 and out_channels == groups


def as_convolution(kernel: Int8, image: tuple[int, int, int] | None) -> Int8:
    """The kernel of a linear step as one of a convolution of one pixel.

    Args:
        kernel: Shape (O, I).
        image: C, H, W of what was flattened into the I features, whose values lie in memory as H, W, C; None: nothing was.

    Returns:
        Shape (O, I, 1, 1).
    """
    if image is not None:
        kernel = kernel.reshape(len(kernel), *image).transpose(0, 2, 3, 1)
    return kernel.reshape(len(kernel), -1, 1, 1)


def blocked(kernel: Int8, groups: int) -> Int8:
    """A kernel in blocks of 16 output channels: [block][row][column][I / 4][16][4], the last block as narrow as it is.

    Args:
        kernel: Shape (O, I, H, W), I of a group.
        groups: Groups of the convolution; each is laid out like a convolution of its own.

    Returns:
        All in a row, I filled up to a multiple of four with zeros; [row][column][O] of a depthwise one.
    """
    outputs, inputs, height, width = kernel.shape
    if is_depthwise(outputs, inputs, groups):
        return np.ascontiguousarray(kernel[:, 0].transpose(1, 2, 0)).ravel()
    padded = np.pad(kernel, ((0, 0), (0, -inputs % 4), (0, 0), (0, 0)))
    parts = []
    for group in np.split(padded, groups):
        for first in range(0, len(group), BLOCK):
            block = group[first : first + BLOCK]
            quads = block.reshape(len(block), -1, 4, height, width).transpose(3, 4, 1, 0, 2)
            parts.append(quads.ravel())
    return np.concatenate(parts)


def takes_winograd(step: Convolve, kernel: Int8, sizes: Geometry, zero: int) -> bool:
    """Whether AVX2 computes a convolution by Winograd's F(4x4,3x3): where it is exact, and faster.

    Args:
        step: The convolution.
        kernel: Shape (O, I, 3, 3) where it may be.
        sizes: Of its images.
        zero: What stands for 0 in the values that it reads.
    """
    outputs, inputs, *taps = kernel.shape
    plain = (step.stride, step.dilation, step.groups, taps) == ((1, 1), (1, 1), 1, [3, 3])
    if not plain or outputs % BLOCK or inputs % BLOCK:
        return False
    # 576 times the sums are found modulo 2^32, and 9 is divided out of that; what is left has 32 bits
    largest = int(np.abs(kernel.astype(np.int64)).sum((1, 2, 3)).max()) * max(zero, 255 - zero)
    tiles = -(-sizes.out_h // 4) * -(-sizes.out_w // 4)
    return 64 * largest < 2**31 and 9 * sizes.out_h * sizes.out_w >= _SAVED * _POSITIONS * tiles
