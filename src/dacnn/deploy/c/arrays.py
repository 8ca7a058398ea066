"""Kernels in the order in which the C file holds them: what is read together lies together. No number is there twice.

Output channels stand in blocks of 16, the last one as wide as what is left: block b is [H][W][I][w_b]. Groups follow each
other, each like a convolution of its own. A depthwise kernel is [H][W][C]. A linear layer is a 1x1 convolution.
"""

import numpy as np
from numpy.typing import NDArray

# O output channels, I input channels of a group, H rows, W columns, C channels of an image, T templates, G groups

Array = NDArray[np.float32]
# output channels of a block: one vector of AVX-512, two of AVX2, four of NEON
BLOCK = 16
# numbers behind the end of an array that a vector load may touch
SLACK = 16


def depthwise(outputs: int, inputs: int, groups: int) -> bool:
    """Whether each channel is convolved by itself.

    Args:
        outputs: Output channels, of all groups.
        inputs: Input channels of one group.
        groups: How many groups there are.
    """
    return groups > 1 and outputs == groups and inputs == 1


def blocked(kernel: Array, groups: int) -> Array:
    """A convolution's kernel as the file holds it.

    Args:
        kernel: Shape (O, I, H, W), I those of one group.
        groups: G.

    Returns:
        The same numbers in one dimension.
    """
    outputs, inputs = kernel.shape[:2]
    if depthwise(outputs, inputs, groups):
        return np.ascontiguousarray(kernel[:, 0].transpose(1, 2, 0)).ravel()
    each = outputs // groups
    blocks = [
        kernel[group * each + first : group * each + min(first + BLOCK, each)].transpose(2, 3, 1, 0).ravel()
        for group in range(groups)
        for first in range(0, each, BLOCK)
    ]
    return np.concatenate(blocks)


def blocked_bank(bank: Array, groups: int) -> Array:
    """Templates, shape (T, O, I, H, W), one behind the other, each as the file holds a kernel."""
    return np.concatenate([blocked(template, groups) for template in bank])


def as_convolution(kernel: Array, image: tuple[int, ...] | None = None) -> Array:
    """A linear kernel as that of a 1x1 convolution.

    Args:
        kernel: Shape (..., O, F).
        image: C, H and W, where the features are an image that lies in memory pixel by pixel.

    Returns:
        Shape (..., O, F, 1, 1), the features in the order of memory.
    """
    if image is not None:
        *before, features = kernel.shape
        kernel = np.moveaxis(kernel.reshape(*before, *image), -3, -1).reshape(*before, features)
    return kernel[..., None, None]
