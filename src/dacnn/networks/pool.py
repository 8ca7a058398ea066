"""Max-pooling that keeps nothing of its own for the gradient.

PyTorch's keeps an eight-byte index for every output: as much as four bfloat16 activations. Which pixel was the largest can
be seen from the input, which is kept anyway, because it is what a ReLU gave.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# N images, C channels, H rows, W columns

_PARTS = 8
_backward = torch.ops.aten.max_pool2d_with_indices_backward


class _HalveByMax(torch.autograd.Function):
    """2x2 max-pooling whose indices are found again when the gradient needs them."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return F.max_pool2d(x, 2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        gradient = torch.empty_like(x)
        # a few images at a time, so that the indices are never all there; a GPU would rather have one launch
        parts = _PARTS if x.device.type == "cpu" else 1
        for some, below, above in zip(*(tensor.chunk(parts) for tensor in (x, gradient, gradients[0])), strict=True):
            _, indices = torch.ops.aten.max_pool2d_with_indices(some, [2, 2], [2, 2])
            below.copy_(_backward(above, some, [2, 2], [2, 2], [0, 0], [1, 1], False, indices))
        return gradient


def halve_by_max(x: Tensor) -> Tensor:
    """Keep the largest of every 2x2 pixels; bit for bit what `max_pool2d` gives, its gradient too.

    Args:
        x: Shape (N, C, H, W).

    Returns:
        Shape (N, C, H // 2, W // 2).
    """
    # a compiler keeps small indices of its own accord
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y: Tensor = _HalveByMax.apply(x)  # type: ignore[no-untyped-call]
        return y
    return F.max_pool2d(x, 2)
