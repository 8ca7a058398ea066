"""Poolings and padding as steps."""

import dataclasses
import math

from torch.fx import Node

from dacnn.deploy.lowering.graph import shape_of
from dacnn.deploy.lowering.translation import Arguments, Step, Translation, Value, pair, written
from dacnn.deploy.program import AveragePool, GlobalAverage, MaxPool

# N images, C channels, H rows, W columns


def _images(to: Translation, node: Node, argument: object) -> Value:
    x = to.as_seen(node, argument)
    if len(x.shape) != 4:
        raise to.refuse(node, f"it takes {written(x.shape)}: expected N x C x H x W")
    return x


def _pooled_side(side: int, size: int, stride: int, padding: int) -> int:
    return (side + padding - size) // stride + 1


def _max_pool(to: Translation, node: Node, given: Arguments) -> Value:
    x = to.as_seen(node, given["self"], padded=True)
    if len(x.shape) != 4 or (x.padder is not None and x.fill != -math.inf):
        raise to.refuse(
            node, f"it takes {written(x.shape)}, padded with {x.fill}: expected N x C x H x W, padded by the pooling"
        )
    size, own = pair(given["kernel_size"]), pair(given["padding"])
    stride = pair(given["stride"] or size)
    if any(apart != 1 and side != 1 for apart, side in zip(pair(given["dilation"]), size, strict=True)):
        raise to.refuse(node, "its windows are dilated: expected windows of neighbours")
    before = [x.padding[index] + own[index] for index in range(2)]
    behind = [x.padding[index + 2] + own[index] for index in range(2)]
    for index in range(2):
        sides = _pooled_side(x.shape[2 + index], size[index], stride[index], before[index] + behind[index])
        if sides != shape_of(node)[2 + index]:
            # ceil_mode lets the last window hang over, which padding at the end does too: it is never the largest
            if before[index] > size[index] - stride[index]:
                raise to.refuse(node, "its last window may hang over the padding (ceil_mode): expected ceil_mode=False")
            behind[index] += stride[index] - 1
    padding = (before[0], before[1], behind[0], behind[1])
    return to.emit(node, lambda out: MaxPool(out, x.name, size, stride, padding))


def _average_pool(to: Translation, node: Node, given: Arguments) -> Value:
    x = _images(to, node, given["self"])
    size = pair(given["kernel_size"])
    stride = pair(given["stride"] or size)
    if shape_of(node)[2:] == (1, 1) and all(side < reach for side, reach in zip(x.shape[2:], size, strict=True)):
        # one window that hangs over on all sides (ceil_mode) is the mean of what is there
        return to.emit(node, lambda out: GlobalAverage(out, x.name))
    if pair(given["padding"]) != (0, 0):
        raise to.refuse(node, "its windows are padded: expected padding=0")
    if given["divisor_override"] not in (None, math.prod(size)):
        raise to.refuse(node, "it divides by a number of its own: expected the mean of each window")
    sides = tuple(_pooled_side(x.shape[2 + index], size[index], stride[index], 0) for index in range(2))
    if sides != shape_of(node)[2:]:
        raise to.refuse(node, "its last window hangs over the image (ceil_mode): expected ceil_mode=False")
    return to.emit(node, lambda out: AveragePool(out, x.name, size, stride))


def _adaptive_average(to: Translation, node: Node, given: Arguments) -> Value:
    x = _images(to, node, given["self"])
    sides, wanted = x.shape[2:], shape_of(node)[2:]
    if wanted == (1, 1):
        return to.emit(node, lambda out: GlobalAverage(out, x.name))
    if wanted == sides:
        return x
    if any(side % target for side, target in zip(sides, wanted, strict=True)):
        raise to.refuse(node, f"it makes {wanted[0]}x{wanted[1]} of {sides[0]}x{sides[1]} pixels: expected whole windows")
    size = (sides[0] // wanted[0], sides[1] // wanted[1])
    return to.emit(node, lambda out: AveragePool(out, x.name, size, size))


def _mean(to: Translation, node: Node, given: Arguments) -> Value:
    argument = given["self"]
    x, shape = to.seen(node, argument), shape_of(argument)
    dims = sorted(int(dim) % len(shape) for dim in (given.get("dim") or ()))
    # over all pixels in a row, too: N x C x HW
    rows_of_pixels = len(x.shape) == 4 and shape == (*x.shape[:2], math.prod(x.shape[2:])) and dims == [2]
    if x.padder is not None or not (rows_of_pixels or (len(x.shape) == 4 and shape == x.shape and dims == [2, 3])):
        raise to.refuse(
            node, f"a mean over dimensions {dims} of {written(shape)}: expected one over all pixels of N x C x H x W"
        )
    return to.emit(node, lambda out: GlobalAverage(out, x.name), shape=(*x.shape[:2], 1, 1))


def _pad(to: Translation, node: Node, given: Arguments) -> Value:
    sizes = [int(size) for size in given["pad"]]
    if not any(sizes):
        return to.as_seen(node, given["self"], padded=True)
    x = to.as_seen(node, given["self"], padded=True)
    fill = float(given.get("value") or 0.0)
    if given.get("mode", "constant") != "constant" or min(sizes) < 0 or any(sizes[4:]) or len(x.shape) != 4:
        raise to.refuse(node, f"it pads by {sizes} in mode '{given.get('mode', 'constant')}': expected zeros around the images")
    if x.padder is not None and x.fill != fill:
        raise to.refuse(node, "it pads what is padded with another number: expected zeros")
    left, right, above, below = (*sizes, 0, 0)[:4]
    padding = (x.padding[0] + above, x.padding[1] + left, x.padding[2] + below, x.padding[3] + right)
    return dataclasses.replace(x, memory=to.new_memory(), padding=padding, fill=fill, padder=node)


WINDOWS: dict[str, Step] = {
    "max_pool2d": _max_pool,
    "avg_pool2d": _average_pool,
    "adaptive_avg_pool2d": _adaptive_average,
    "mean": _mean,
    "pad": _pad,
    "constant_pad_nd": _pad,
}
