"""Layers with weights as steps: convolutions, linear layers and norms."""

from typing import Any

import torch
from torch.fx import Node

from dacnn.deploy.lowering.graph import Shape, shape_of
from dacnn.deploy.lowering.translation import Arguments, Padding, Step, Translation, Value, pair, written
from dacnn.deploy.program import Convolve, Linear

# N images, C channels, H rows, W columns, F features


def _convolve(to: Translation, node: Node, given: Arguments) -> Value:
    x = to.as_seen(node, given["input"], padded=True)
    if len(x.shape) != 4 or x.shape != _unpadded(shape_of(given["input"]), x.padding):
        raise to.refuse(node, f"it takes {written(shape_of(given['input']))}: expected images, N x C x H x W")
    if x.fill != 0:
        raise to.refuse(node, f"its images are padded with {x.fill}: expected zeros")
    kernel = to.kernels.kernel(given["weight"], node)
    stride, dilation = pair(given["stride"]), pair(given["dilation"])
    above, left, below, right = _own_padding(given["padding"], shape_of(given["weight"])[2:], dilation)
    padding = (x.padding[0] + above, x.padding[1] + left, x.padding[2] + below, x.padding[3] + right)
    y = to.emit(node, lambda out: Convolve(out, x.name, kernel, stride, padding, dilation, int(given["groups"])))
    return _biased(to, node, y, given["bias"])


def _unpadded(shape: Shape, padding: Padding) -> Shape:
    above, left, below, right = padding
    return (*shape[:2], shape[2] - above - below, shape[3] - left - right) if len(shape) == 4 else shape


def _own_padding(padding: Any, size: Shape, dilation: tuple[int, int]) -> Padding:
    if padding == "same":
        rows, columns = ((side - 1) * apart for side, apart in zip(size, dilation, strict=True))
        return (rows // 2, columns // 2, rows - rows // 2, columns - columns // 2)
    rows, columns = (0, 0) if padding == "valid" else pair(padding)
    return (rows, columns, rows, columns)


def _biased(to: Translation, node: Node, y: Value, bias: Node | None) -> Value:
    if bias is None:
        return y
    shift = to.known(bias)
    if shift is None:
        raise to.refuse(node, "its bias follows from the images: expected one that is stored")
    return to.affine(node, y, None, shift, shift_name=to.kernels.name_of(shift, bias))


def _linear(to: Translation, node: Node, given: Arguments) -> Value:
    x = to.as_seen(node, given["input"])
    if len(x.shape) != 2:
        raise to.refuse(node, f"it takes {written(x.shape)}: expected N x F, one row for each image")
    kernel = to.kernels.kernel(given["weight"], node)
    return _biased(to, node, to.emit(node, lambda out: Linear(out, x.name, kernel)), given["bias"])


def _batch_norm(to: Translation, node: Node, given: Arguments) -> Value:
    x = to.as_seen(node, given["input"])
    if given["training"] or given["running_mean"] is None:
        raise to.refuse(node, "it takes mean and variance of the batch: expected a norm with running statistics")
    if len(x.shape) not in (2, 4):
        raise to.refuse(node, f"it takes {written(x.shape)}: expected N x C x H x W or N x F")
    gain, bias, mean, variance = (
        None if given[key] is None else to.known(given[key]) for key in ("weight", "bias", "running_mean", "running_var")
    )
    if mean is None or variance is None:
        raise to.refuse(node, "its statistics follow from the images: expected stored ones")
    scale = 1 / torch.sqrt(variance + given["eps"])
    scale = scale if gain is None else scale * gain
    shift = -mean * scale if bias is None else bias - mean * scale
    return to.affine(node, x, scale, shift, is_norm=True)


WEIGHTED: dict[str, Step] = {"conv2d": _convolve, "linear": _linear, "batch_norm": _batch_norm}
