"""What PyTorch's operators on a CPU take for themselves beside their results: memory that no tensor of the program shows.

Convolutions are oneDNN's, which wants kernels (and, where they are not channels-last, images) in a blocked format of its
own, and sums up a kernel's gradient in float32, in parts where several threads work on it; a few small ones are PyTorch's,
which makes a matrix of the image. Found by reading the memory events of PyTorch 2.13 on x86-64, with AVX-512 and with
AVX2 alone, operator by operator; left out is what stays below some kilobytes.
"""

# N images, C input channels, O output channels, H rows, W columns

from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten
# channels of one block: the float32 lanes of a register
_BLOCK = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
# values of a single image up to which PyTorch convolves it itself
_SMALL_IMAGE = 20480


def cpu_workspace_bytes(operator: Any, arguments: tuple[Any, ...], results: Any, *, threads: int, channels_last: bool) -> int:
    """What one call of an operator takes beside its results, at most.

    Args:
        operator: An operator of `torch.ops.aten`.
        arguments: Its positional arguments.
        results: What it returned.
        threads: CPU threads that work on it.
        channels_last: Whether all images are in channels-last memory, whatever their strides say: those of a tensor
            without values are wrong behind some operators.

    Returns:
        Bytes; 0 for an operator that takes nothing worth counting.
    """
    if operator is _ATEN.convolution.default:
        x, kernel = arguments[:2]
        return _convolution(x, kernel, results, threads, channels_last or _is_channels_last(x))
    if operator is _ATEN.convolution_backward.default:
        gradient, x, kernel = arguments[:3]
        return _convolution_backward(gradient, x, kernel, threads, channels_last or _is_channels_last(x, gradient))
    if operator is _ATEN.native_batch_norm_backward.default:
        # the gradient of the input is allocated twice, and one of the two is never used
        return _bytes_of(results[0])
    return 0


def _bytes_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


def _is_channels_last(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)


def _is_matrix_product(x: Tensor, kernel: Tensor, threads: int) -> bool:
    """Whether PyTorch convolves by itself instead of asking oneDNN."""
    if x.dtype != torch.float32:
        return False
    alone = x.shape[0] == 1 and x.numel() <= _SMALL_IMAGE and kernel.shape[-1] <= 3
    return alone or (kernel.shape[-1] == 1 and x.shape[0] < 16 and threads == 1)


def _columns_bytes(x: Tensor, kernel: Tensor) -> int:
    """Bytes of the matrix that holds for every pixel what the kernel meets there; pixels alone are one as they are."""
    return x.nbytes * kernel.shape[-1] ** 2 if kernel.shape[-1] > 1 else 0


def _blocks(channels: int) -> int:
    """The channels, filled up to whole blocks."""
    return -(-channels // _BLOCK) * _BLOCK


def _blocked_kernel_elements(kernel: Tensor) -> int:
    return _blocks(kernel.shape[0]) * _blocks(kernel.shape[1]) * kernel.shape[2:].numel()


def _blocked_image_bytes(image: Tensor) -> int:
    return image.nbytes // image.shape[1] * _blocks(image.shape[1])


def _copy_bytes(kernel: Tensor, channels_last: bool) -> int:
    """Bytes of the copy that brings a kernel to channels-last images."""
    return kernel.nbytes if channels_last and not _is_channels_last(kernel) else 0


def _convolution(x: Tensor, kernel: Tensor, y: Tensor, threads: int, channels_last: bool) -> int:
    copy = _copy_bytes(kernel, channels_last)
    if _is_matrix_product(x, kernel, threads):
        return copy + _columns_bytes(x, kernel)
    blocked = _blocked_kernel_elements(kernel) * kernel.itemsize
    if channels_last:
        return copy + blocked
    result = _blocked_image_bytes(y)
    # few channels are read as they are
    image = _blocked_image_bytes(x) if x.shape[1] >= _BLOCK else 0
    # everything is blocked to compute; then the result stands blocked beside the plain one
    return max(image + blocked + result - y.nbytes, result)


def _convolution_backward(gradient: Tensor, x: Tensor, kernel: Tensor, threads: int, channels_last: bool) -> int:
    """First the image's gradient is found, then the kernel's, for which there is room already in the final result."""
    copy, plain = _copy_bytes(kernel, channels_last), kernel.nbytes
    if _is_matrix_product(x, kernel, threads):
        return copy + _columns_bytes(x, kernel)
    blocked = _blocked_kernel_elements(kernel) * kernel.itemsize
    sums = _sums_bytes(gradient, x, kernel, threads, channels_last)
    if channels_last:
        # the kernel's gradient beside the sums, blocked; then blocked, in the images' format, and as it is returned
        return copy + blocked + max(sums - plain, plain)
    images = _blocked_image_bytes(x) + _blocked_image_bytes(gradient)
    return max(images + blocked - x.nbytes - plain, images + blocked + sums - plain, blocked)


def _sums_bytes(gradient: Tensor, x: Tensor, kernel: Tensor, threads: int, channels_last: bool) -> int:
    """Bytes in which the parts of a kernel's gradient are summed up."""
    in_float32 = _blocked_kernel_elements(kernel) * torch.float32.itemsize
    # threads share the images where those outweigh the kernel, each with a sum of its own; else they share the kernel
    parts = max(1, min(threads, (x.nbytes + gradient.nbytes) // kernel.nbytes))
    if x.dtype == torch.float32:
        return (parts - 1) * in_float32
    # each thread turns the image that it works on, and its gradient, so that pairs of pixels lie together
    turns = channels_last or kernel.shape[-1] > 1
    return parts * in_float32 + threads * turns * (x.nbytes + gradient.nbytes) // x.shape[0]
