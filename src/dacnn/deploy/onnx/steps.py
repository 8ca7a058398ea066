"""Every operation of a Program as nodes of ONNX."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dacnn.deploy.onnx.graph import Graph
from dacnn.deploy.program import (
    Activate,
    Add,
    AveragePool,
    CombinedKernel,
    Convolve,
    Flatten,
    GlobalAverage,
    Kernel,
    Linear,
    MaxPool,
    Multiply,
    Normalize,
    Operation,
    Reference,
    Rotate,
    ScaleShift,
    StoredKernel,
)
from dacnn.deploy.shapes import kernel_shape, tensor_shape

# N images, C channels, H rows, W columns, O output channels, I input channels, T templates, R x S tiles

_TO_THE_END = np.iinfo(np.int64).max


def write(graph: Graph, step: Operation) -> str:
    """Add the nodes of one operation.

    Args:
        graph: Where they are added.
        step: The operation.

    Returns:
        Name of what it gives.
    """
    return _WRITERS[type(step)](graph, step)


def _normalize(graph: Graph, step: Normalize) -> str:
    of = graph.model.program.input
    mean, std = np.array(of.mean), np.array(of.std)
    # whole planes are scaled, not pixels of three numbers
    planes = graph.node("Transpose", [graph.value(step.x)], f"{step.out}.planes", perm=[0, 3, 1, 2])
    floats = graph.node("Cast", [planes], f"{step.out}.floats", to=graph.model.onnx.TensorProto.FLOAT)
    factor = graph.constant((1 / (255 * std)).reshape(1, -1, 1, 1), f"{step.out}.factor")
    scaled = graph.node("Mul", [floats, factor], f"{step.out}.scaled")
    offset = graph.constant((-mean / std).reshape(1, -1, 1, 1), f"{step.out}.offset")
    return graph.node("Add", [scaled, offset], step.out)


def _kernel(graph: Graph, kernel: Kernel) -> str:
    """The nodes that read or compute a kernel."""
    tensors = graph.model.program.tensors
    stored = tensor_shape(kernel.tensor, tensors)
    if isinstance(kernel, StoredKernel):
        return graph.tensor(kernel.tensor, stored)
    shape = kernel_shape(kernel, tensors)
    if isinstance(kernel, CombinedKernel):
        # The bank is an image of T channels, the combination its 1x1 convolution. Other operators give the same, but ONNX
        # Runtime packs the bank for a MatMul or Gemm, and lays it out anew for an Einsum.
        templates, first, second, *size = stored
        bank = graph.tensor(kernel.tensor, (1, templates, first, second * int(np.prod(size))))
        coefficients = graph.unfolded(kernel.coefficients, (1, templates, 1, 1))
        combined = graph.node("Conv", [bank, coefficients], "kernel.combined")
    else:
        # tile (r, s) stands at output channels r, input channels s
        first, second, *size = stored
        base = graph.tensor(kernel.tensor, (1, first, 1, second, *size))
        gain, steepness = (_of_tiles(graph, tensor, len(size)) for tensor in (kernel.gain, kernel.steepness))
        # w / (1 + exp(s * w)) is w * sigmoid(-s * w), which never overflows
        exponent = graph.node("Mul", [base, graph.node("Neg", [steepness], "kernel.fall")], "kernel.exponent")
        bent = graph.node("Mul", [base, graph.node("Sigmoid", [exponent], "kernel.gate")], "kernel.bent")
        combined = graph.node("Mul", [bent, gain], "kernel.tiled")
    return graph.node("Reshape", [combined, graph.constant(shape, "kernel.shape", np.int64)], "kernel")


def _of_tiles(graph: Graph, tensor: Reference, sides: int) -> str:
    """One number for every tile."""
    tiles_out, tiles_in = tensor_shape(tensor, graph.model.program.tensors)
    return graph.unfolded(tensor, (tiles_out, 1, tiles_in, 1, *(1,) * sides))


def _convolve(graph: Graph, step: Convolve) -> str:
    kernel = _kernel(graph, step.kernel)
    return graph.node(
        "Conv",
        [graph.value(step.x), kernel],
        step.out,
        kernel_shape=kernel_shape(step.kernel, graph.model.program.tensors)[2:],
        strides=step.stride,
        pads=step.padding,
        dilations=step.dilation,
        group=step.groups,
    )


def _linear(graph: Graph, step: Linear) -> str:
    return graph.node("Gemm", [graph.value(step.x), _kernel(graph, step.kernel)], step.out, transB=1)


def _scale_shift(graph: Graph, step: ScaleShift) -> str:
    # as two operators: a BatchNormalization is what runtimes fold into the kernel first
    value = graph.value(step.x)
    sides = (1,) * (len(graph.model.shapes[step.x]) - 2)
    tensors = graph.model.program.tensors
    if step.scale is not None:
        shape = (1, *tensor_shape(step.scale, tensors), *sides)
        # of a kernel that others read too, a runtime would make a copy with this scale in it
        scale = (
            graph.unfolded(step.scale, shape) if step.x in graph.model.of_shared_kernels else graph.tensor(step.scale, shape)
        )
        value = graph.node("Mul", [value, scale], step.out if step.shift is None else f"{step.out}.scaled")
    if step.shift is not None:
        shift = graph.tensor(step.shift, (1, *tensor_shape(step.shift, tensors), *sides))
        value = graph.node("Add", [value, shift], step.out)
    return value


def _activate(graph: Graph, step: Activate) -> str:
    return _ACTIVATIONS[step.kind](graph, step, graph.value(step.x))


def _clip(graph: Graph, step: Activate, x: str) -> str:
    low, high = ("" if np.isinf(end) else graph.constant(end, f"{step.out}.end") for end in (step.low, step.high))
    return graph.node("Clip", [x, low, high], step.out)


def _hard_sigmoid(graph: Graph, step: Activate, x: str) -> str:
    return graph.node("HardSigmoid", [x], f"{step.out}.gate", alpha=1 / 6, beta=0.5)


def _gelu(graph: Graph, step: Activate, x: str) -> str:
    # in the order of operators that runtimes know as one function
    narrow = graph.node("Div", [x, graph.constant(np.sqrt(2), f"{step.out}.root")], f"{step.out}.narrow")
    error = graph.node("Erf", [narrow], f"{step.out}.error")
    raised = graph.node("Add", [error, graph.constant(1, f"{step.out}.one")], f"{step.out}.raised")
    doubled = graph.node("Mul", [x, raised], f"{step.out}.doubled")
    return graph.node("Mul", [doubled, graph.constant(0.5, f"{step.out}.half")], step.out)


_ACTIVATIONS: dict[str, Callable[[Graph, Activate, str], str]] = {
    "relu": lambda graph, step, x: graph.node("Relu", [x], step.out),
    "clip": _clip,
    "sigmoid": lambda graph, step, x: graph.node("Sigmoid", [x], step.out),
    "silu": lambda graph, step, x: graph.node("Mul", [x, graph.node("Sigmoid", [x], f"{step.out}.gate")], step.out),
    "hardsigmoid": _hard_sigmoid,
    "hardswish": lambda graph, step, x: graph.node("Mul", [x, _hard_sigmoid(graph, step, x)], step.out),
    "gelu": _gelu,
    "tanh": lambda graph, step, x: graph.node("Tanh", [x], step.out),
}


def _max_pool(graph: Graph, step: MaxPool) -> str:
    window = {"kernel_shape": step.size, "strides": step.stride, "pads": step.padding}
    return graph.node("MaxPool", [graph.value(step.x)], step.out, **window)


def _average_pool(graph: Graph, step: AveragePool) -> str:
    return graph.node("AveragePool", [graph.value(step.x)], step.out, kernel_shape=step.size, strides=step.stride)


def _rotate(graph: Graph, step: Rotate) -> str:
    channels = graph.model.shapes[step.x][1]
    by = step.by % channels if channels else step.by
    cut = graph.constant([by], f"{step.out}.cut", np.int64)
    ends = [graph.constant([end], f"{step.out}.end", np.int64) for end in (0, _TO_THE_END)]
    axis = graph.constant([1], f"{step.out}.axis", np.int64)
    x = graph.value(step.x)
    behind = graph.node("Slice", [x, cut, ends[1], axis], f"{step.out}.behind")
    before = graph.node("Slice", [x, ends[0], cut, axis], f"{step.out}.before")
    return graph.node("Concat", [behind, before], step.out, axis=1)


def _simple(operator: str, **attributes: Any) -> Callable[[Graph, Any], str]:
    """What writes an operation that ONNX has under another name."""

    def writes(graph: Graph, step: Any) -> str:
        values = [step.x, step.y] if isinstance(step, Add | Multiply) else [step.x]
        return graph.node(operator, list(map(graph.value, values)), step.out, **attributes)

    return writes


_WRITERS: dict[type[Operation], Callable[[Graph, Any], str]] = {
    Normalize: _normalize,
    Convolve: _convolve,
    Linear: _linear,
    ScaleShift: _scale_shift,
    Activate: _activate,
    MaxPool: _max_pool,
    AveragePool: _average_pool,
    GlobalAverage: _simple("GlobalAveragePool"),
    Flatten: _simple("Flatten", axis=1),
    Rotate: _rotate,
    Add: _simple("Add"),
    Multiply: _simple("Mul"),
}
