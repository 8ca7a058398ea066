"""Winograd's convolution F(4x4, 3x3): a quarter of the multiplications, in the forward pass and for the gradients.

Sixteen outputs of a 3x3 kernel take 36 products instead of 144: a tile of 6x6 pixels and the kernel, seen as polynomials, are
multiplied at six points in each direction. All the rest is linear, so gradients go the same way back; that of the kernel is
summed up at the points over all tiles, and leaves them once. Everything is matrix products, over a few images at a time: their
tiles stay in the processor's caches, and no activation is there in a second form.

The points are 0, ±√½, ±√2 and infinity: in C a quarter of the error of 0, ±1, ±2 (1.3e-6 against 5.6e-6 of the largest output
on 128 channels). Here values and gradients err by up to 1e-5 of the largest.

Source:
    Lavin and Gray, CVPR 2016, arXiv:1509.09308. Deviations: the points; the gradients.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from dacnn.sharing.parts import to_do

# N images, C channels of the input, O of the output, H rows, W columns; T tiles, P = 36 points

_Matrix = NDArray[np.float64]

SMALL_POINT = 0.5**0.5
LARGE_POINT = 2**0.5
_ROOTS = (SMALL_POINT, -SMALL_POINT, LARGE_POINT, -LARGE_POINT)
_OUTPUTS = 4
_TILE = 6
_POINTS = 36

# G: a kernel to its values at the points, each divided by what the interpolation would divide by
KERNEL_TO_POINTS = np.array(
    [
        [1, 0, 0],
        *([root**power * (-2 / 3 if abs(root) == SMALL_POINT else 1 / 6) for power in range(3)] for root in _ROOTS),
        [0, 0, 1],
    ]
)
# B^T: the pixels of a tile to the points; rows are the polynomials that vanish at all other points
_PIXELS_TO_POINTS = np.array(
    [
        [1, 0, -2.5, 0, 1, 0],
        *([0, -1 / root, -1 / root**2, root, 1, 0] for root in _ROOTS),
        [0, 1, 0, -2.5, 0, 1],
    ]
)
# A^T: products at the points to outputs
_POINTS_TO_OUTPUTS = np.array([[power == 0, *(root**power for root in _ROOTS), power == 3] for power in range(_OUTPUTS)])

# tiles times channels that are transformed at once: 128 tiles of 128 channels, 2.4 MB at the points
_AT_ONCE = 128 * 128
# the way to the points and back costs what products with so many more channels would, and Winograd's shall be that much faster
_WAY = 130
_GAIN = 1.15

_wanted: ContextVar[bool] = ContextVar("winograd", default=False)


@contextlib.contextmanager
def by_winograd(wanted: bool = True) -> Iterator[None]:
    """Within this context, `convolve` goes by Winograd where that pays.

    Args:
        wanted: False: it does not, whatever surrounds this context.
    """
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def is_by_winograd() -> bool:
    """Whether `by_winograd` is in force."""
    return _wanted.get()


def pays(x: Tensor, kernel: Tensor) -> bool:
    """Whether Winograd's is the faster convolution, with its gradients, on a CPU with AVX2 alone.

    The estimate is within a fifth of what was measured with 64 to 512 channels at 4x4 to 32x32 pixels.

    Args:
        x: Shape (N, C, H, W).
        kernel: Shape (O, C, K, K).
    """
    if kernel.shape[2:] != (3, 3):
        return False
    (_, channels, height, width), out_channels = x.shape, kernel.shape[0]
    # nothing is multiplied with the border
    plain_products = (3 * height - 2) * (3 * width - 2)
    mean_channels = 2 / (1 / channels + 1 / out_channels)
    products = _POINTS * _tiles(height) * _tiles(width) * (1 + _WAY / mean_channels)
    return bool(plain_products >= _GAIN * products)


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve at stride 1, the image keeping its size.

    Args:
        x: Shape (N, C, H, W).
        kernel: Shape (O, C, K, K), K odd.

    Returns:
        Shape (N, O, H, W).
    """
    # a compiler cannot follow a context, and is asked first
    wanted = not torch.compiler.is_compiling() and is_by_winograd() and not torch.is_autocast_enabled(x.device.type)
    if wanted and pays(x, kernel):
        return convolve_by_winograd(x, kernel)
    return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)


def convolve_by_winograd(x: Tensor, kernel: Tensor) -> Tensor:
    """The convolution of N x C x H x W with a kernel O x C x 3 x 3, at stride 1 and padding 1, whether it pays or not."""
    return _Winograd.apply(x, kernel)  # type: ignore[no-any-return,no-untyped-call]


class _Winograd(torch.autograd.Function):
    """The convolution with its gradients."""

    @staticmethod
    def forward(context: Any, x: Tensor, kernel: Tensor) -> Tensor:
        context.save_for_backward(x, kernel)
        y = x.new_empty(len(x), *x.shape[2:], len(kernel))
        at_points = _kernel_at_points(kernel)
        x_nhwc = _last_channels(x)
        for images in _parts(x, kernel):
            _write_outputs(_transformed(_POINTS_TO_OUTPUTS, _tiles_at_points(x_nhwc[images]) @ at_points), y[images])
        return _first_channels(y)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = context.saved_tensors
        for_x, for_kernel = context.needs_input_grad
        at_points = _kernel_at_points(kernel)
        of_points = torch.zeros_like(at_points)
        x_nhwc = _last_channels(x)
        of_y = _last_channels(gradients[0])
        of_x = torch.empty_like(x_nhwc) if for_x else None
        for images in _parts(x, kernel):
            of_products = _transformed(_POINTS_TO_OUTPUTS.T, _outputs(of_y[images]))
            if for_kernel:
                of_points.flatten(0, 1).baddbmm_(_tiles_at_points(x_nhwc[images]).mT.flatten(0, 1), of_products.flatten(0, 1))
            if of_x is not None:
                _add_tiles(_transformed(_PIXELS_TO_POINTS.T, of_products @ at_points.mT), of_x[images])
        of_kernel = _transformed(KERNEL_TO_POINTS.T, of_points).permute(3, 2, 0, 1)
        return _first_channels(of_x) if of_x is not None else None, of_kernel.contiguous() if for_kernel else None


def _transformed(matrix: _Matrix, tiles: Tensor) -> Tensor:
    """Apply a matrix, Y x X, to rows and columns of tiles: X x X x ... to Y x Y x ..., rows and columns exchanged."""
    factor = torch.from_numpy(matrix).to(tiles)
    values = tiles.flatten(2)
    for _ in range(2):
        values = torch.bmm(factor.expand(len(values), -1, -1), values).transpose(0, 1)
    return values.transpose(0, 1).view(len(matrix), len(matrix), *tiles.shape[2:])


def _kernel_at_points(kernel: Tensor) -> Tensor:
    """O x C x 3 x 3 to 6 x 6 x C x O."""
    return _transformed(KERNEL_TO_POINTS, kernel.permute(2, 3, 1, 0))


def _tiles_at_points(x_nhwc: Tensor) -> Tensor:
    """N x H x W x C to 6 x 6 x T x C; tiles overlap by two pixels, and by one the border of zeros."""
    _, height, width, channels = x_nhwc.shape
    below, right = (_tiles(pixels) * _OUTPUTS - pixels + 1 for pixels in (height, width))
    padded = F.pad(x_nhwc, (0, 0, 1, right, 1, below))
    tiles = padded.unfold(1, _TILE, _OUTPUTS).unfold(2, _TILE, _OUTPUTS).permute(4, 5, 0, 1, 2, 3)
    return _transformed(_PIXELS_TO_POINTS, tiles.reshape(_TILE, _TILE, -1, channels))


def _add_tiles(tiles: Tensor, x_nhwc: Tensor) -> None:
    """Add up tiles that overlap, the way back of taking them: 6 x 6 x T x C into N x H x W x C."""
    count, height, width, channels = x_nhwc.shape
    rows, columns = _tiles(height), _tiles(width)
    tiles = tiles.view(_TILE, _TILE, count, rows, columns, channels)
    # a tile's last two pixels are the first two of the next one
    padded = tiles.new_zeros(count, rows + 1, _OUTPUTS, columns + 1, _OUTPUTS, channels)
    blocks = padded.permute(2, 4, 0, 1, 3, 5)
    blocks[:, :, :, :-1, :-1] = tiles[:4, :4]
    blocks[:2, :, :, 1:, :-1] += tiles[4:, :4]
    blocks[:, :2, :, :-1, 1:] += tiles[:4, 4:]
    blocks[:2, :2, :, 1:, 1:] += tiles[4:, 4:]
    x_nhwc.copy_(padded.flatten(3, 4).flatten(1, 2)[:, 1 : height + 1, 1 : width + 1])


def _outputs(y_nhwc: Tensor) -> Tensor:
    """N x H x W x O to 4 x 4 x T x O; what sticks out of the image is zero."""
    _, height, width, channels = y_nhwc.shape
    rows, columns = _tiles(height), _tiles(width)
    padded = F.pad(y_nhwc, (0, 0, 0, columns * _OUTPUTS - width, 0, rows * _OUTPUTS - height))
    blocks = padded.reshape(-1, rows, _OUTPUTS, columns, _OUTPUTS, channels)
    return blocks.permute(2, 4, 0, 1, 3, 5).reshape(_OUTPUTS, _OUTPUTS, -1, channels)


def _write_outputs(outputs: Tensor, y_nhwc: Tensor) -> None:
    """4 x 4 x T x O into N x H x W x O; what sticks out of the image is left out."""
    count, height, width, channels = y_nhwc.shape
    rows, columns = _tiles(height), _tiles(width)
    blocks = outputs.view(_OUTPUTS, _OUTPUTS, count, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
    if (height, width) == (rows * _OUTPUTS, columns * _OUTPUTS):
        y_nhwc.view(count, rows, _OUTPUTS, columns, _OUTPUTS, channels).copy_(blocks)
    else:
        y_nhwc.copy_(blocks.reshape(count, rows * _OUTPUTS, columns * _OUTPUTS, channels)[:, :height, :width])


def _tiles(pixels: int) -> int:
    """Tiles that cover so many pixels."""
    return -(-pixels // _OUTPUTS)


def _parts(x: Tensor, kernel: Tensor) -> Sequence[slice]:
    """Images by as many as have tiles that stay in a cache of some megabytes."""
    step = max(1, _AT_ONCE // (_tiles(x.shape[2]) * _tiles(x.shape[3]) * max(kernel.shape[:2])))
    return to_do([slice(begin, begin + step) for begin in range(0, len(x), step)])


def _last_channels(x: Tensor) -> Tensor:
    """N x C x H x W as N x H x W x C, in this order in memory."""
    return x.permute(0, 2, 3, 1).contiguous()


def _first_channels(x_nhwc: Tensor) -> Tensor:
    """N x H x W x C as N x C x H x W, the memory as it was."""
    return x_nhwc.permute(0, 3, 1, 2)
