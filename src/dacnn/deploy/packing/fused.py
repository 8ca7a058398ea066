"""What follows a convolution on a GPU, in one pass: scale, shift and ReLU, and pooling of two by two.

A pass reads and writes every activation, which takes as long as the convolution itself. These passes are compiled once for
all networks of a process, by their number formats alone: sizes are arguments.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# N images, C channels, H rows, W columns, M pixels of all images


def is_available(device: torch.device) -> bool:
    """Whether passes can be compiled for a device: on a GPU, by Triton, which comes with PyTorch on most systems."""
    return device.type == "cuda" and find_spec("triton") is not None


def affine(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, relu: bool) -> Tensor:
    """Scale and shift the channels of images, then ReLU.

    Args:
        x: N x C x H x W, in channels-last memory, of any type.
        scale: Shape (C,), float32.
        shift: Shape (C,), float32.
        dtype: Type of the result.
        relu: Whether to end with a ReLU.

    Returns:
        N x C x H x W, in channels-last memory.
    """
    nhwc = x.permute(0, 2, 3, 1)
    y: Tensor = _compiled(_affine_relu if relu else _affine)(nhwc.reshape(-1, x.shape[1]), scale, shift, dtype)
    return y.view(nhwc.shape).permute(0, 3, 1, 2)


def affine_halved(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale and shift the channels of images, then ReLU, then the maximum of every two by two pixels.

    Args:
        x: N x C x H x W, in channels-last memory, H and W even.
        scale: Shape (C,), float32.
        shift: Shape (C,), float32.
        dtype: Type of the result.

    Returns:
        N x C x H / 2 x W / 2, in channels-last memory.
    """
    count, channels, rows, columns = x.shape
    blocks = x.permute(0, 2, 3, 1).reshape(count * rows // 2, 2, columns // 2, 2, channels)
    y: Tensor = _compiled(_affine_relu_halved)(blocks, scale, shift, dtype)
    return y.view(count, rows // 2, columns // 2, channels).permute(0, 3, 1, 2)


@lru_cache
def _compiled(of: Callable[..., Tensor]) -> Any:
    return torch.compile(of, dynamic=True)


def _affine(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.float() * scale + shift).to(dtype)


def _affine_relu(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.float() * scale + shift).relu().to(dtype)


def _affine_relu_halved(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    # of blocks, N * H / 2 x 2 x W / 2 x 2 x C
    return (x.float() * scale + shift).relu().amax((1, 3)).to(dtype)
