"""What follows a convolution on a GPU, in one pass: scale, shift and ReLU, and pooling of two by two.

Every pass reads and writes all activations, and together they take longer than the convolutions. They are compiled by Triton,
once for all networks of a process: the sizes of images are arguments, and only a size of 1 and another number format make a
new variant.
"""

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# N images, C channels, H rows, W columns

# PyTorch's own limit, behind which it computes step by step, is 8; two formats and sizes of 1 make more
_MOST_VARIANTS = 64
# one thread at a time changes PyTorch's settings and changes them back
_settings = threading.Lock()


@lru_cache
def is_available(device: torch.device) -> bool:
    """Whether passes can be compiled for a device: for a GPU that Triton knows, where it and its C compiler are."""
    if device.type != "cuda":
        return False
    image, term = torch.zeros(1, 2, 2, 2, device=device), torch.zeros(2, device=device)
    try:
        affine(image, term, term, torch.float32)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # whatever is missing, PyTorch computes step by step
        return False
    return True


def affine(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, *, relu: bool = False, pool: bool = False) -> Tensor:
    """Scale and shift the channels of images; then ReLU, then the maximum of every two by two pixels, where they are asked for.

    Args:
        x: N x C x H x W, in channels-last memory.
        scale: Shape (C,), float32.
        shift: Shape (C,), float32.
        dtype: Type of the result.
        relu: Whether a ReLU follows.
        pool: Whether pooling follows that.

    Returns:
        N x C x H x W, or N x C x H // 2 x W // 2, in channels-last memory.
    """
    count, channels, rows, columns = x.shape
    nhwc = x.permute(0, 2, 3, 1)
    if relu and pool and rows % 2 == columns % 2 == 0:
        blocks = nhwc.reshape(count * rows // 2, 2, columns // 2, 2, channels)
        y: Tensor = _compiled(_affine_relu_pool)(blocks, scale, shift, dtype)
        return y.view(count, rows // 2, columns // 2, channels).permute(0, 3, 1, 2)
    y = _compiled(_affine_relu if relu else _affine)(nhwc.reshape(-1, channels), scale, shift, dtype)
    y = y.view(nhwc.shape).permute(0, 3, 1, 2)
    return F.max_pool2d(y, 2) if pool else y


@lru_cache
def _compiled(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from torch._dynamo import config
    from torch.fx.experimental import _config as sizes

    compiled = torch.compile(of, dynamic=True)

    def call(*arguments: Any) -> Tensor:
        # nor shall sizes that happen to be equal make a variant
        with _settings, config.patch(recompile_limit=_MOST_VARIANTS), sizes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(*arguments)

    return call


def _affine(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.float() * scale + shift).to(dtype)


def _affine_relu(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.float() * scale + shift).relu().to(dtype)


def _affine_relu_pool(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    # of blocks, N * H / 2 x 2 x W / 2 x 2 x C
    return (x.float() * scale + shift).relu().amax((1, 3)).to(dtype)
