"""Small programs written by hand, and the check that ONNX Runtime computes from them what their interpreter does."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from dacnn.deploy.onnx.model import to_onnx, to_onnx_loop
from dacnn.deploy.program import (
    Convolve,
    Flatten,
    GlobalAverage,
    Linear,
    Loop,
    Normalize,
    Program,
    ScaleShift,
    Step,
    StoredKernel,
)
from dacnn.networks.plan import Input
from interpreter import run

# N images, H rows, W columns, C channels, O output channels, I input channels, L turns

Array = NDArray[np.float32]

# of the largest logit: float32 sums a few thousand products in another order than float64
TOLERANCE = 2e-5
INPUT = Input(12, 10, 3, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), fit="pad")
CLASSES = ("cat", "dog", "naïve", "x")
C = 8
FORMS = ("small", "fast")


def drawn(*shape: int, seed: int = 0) -> Array:
    """Numbers like those of a network: what a kernel of this shape makes is about as large as what it takes."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return (values / math.sqrt(max(1, math.prod(shape[-3:] if len(shape) > 2 else shape[-1:])))).astype(np.float32)


def uint8_images(
    count: int, height: int = INPUT.height, width: int = INPUT.width, channels: int = INPUT.channels
) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def program(*steps: Step, channels: int = C, averaged: bool = False, **tensors: Array) -> Program:
    """Steps from `x`, C channels and even sides, to `y`; before them a stem, behind them a classifier.

    Args:
        steps: The steps.
        channels: Channels of `y`.
        averaged: Whether `y` is N x F already.
        tensors: What the steps name; an underscore stands for a dot.
    """
    stored = {"stem": drawn(C, 3, 3, 3), "head": drawn(len(CLASSES), channels), "bias": drawn(len(CLASSES))}
    before = (Normalize("planes", "images"), Convolve("x", "planes", StoredKernel("stem"), padding=(1, 1, 1, 1)))
    average = () if averaged else (GlobalAverage("mean", "y"), Flatten("features", "mean"))
    behind = (
        *average,
        Linear("products", "y" if averaged else "features", StoredKernel("head")),
        ScaleShift("sums", "products", None, "bias"),
    )
    names = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
    return Program("tiny", INPUT, CLASSES, (*before, *steps, *behind), "sums", {**stored, **names})


def runtime_logits(model: onnx.ModelProto, images: NDArray[Any]) -> Array:
    """In a default session."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: Array = session.run(["logits"], {"images": images})[0]
    return logits


def normalized(images: NDArray[np.uint8], of: Input = INPUT) -> Array:
    planes = (images / 255 - np.array(of.mean)) / np.array(of.std)
    return np.ascontiguousarray(planes.transpose(0, 3, 1, 2).astype(np.float32))


def models(of: Program, float_input: bool) -> Iterator[onnx.ModelProto]:
    """The program in every form that it has."""
    if not any(isinstance(step, Loop) for step in of.steps):
        yield to_onnx(of, float_input=float_input)
    for form in FORMS:
        yield to_onnx_loop(of, float_input=float_input, form=form)


def check_logits(
    model: onnx.ModelProto, images: NDArray[Any], expected: NDArray[np.float64], relative: float = TOLERANCE
) -> None:
    found = runtime_logits(model, images)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all that stand in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def stored_arrays(model: onnx.ModelProto) -> list[tuple[str, NDArray[Any]]]:
    """Name and values of all that is stored, in whatever graph."""
    stored = [tensor for graph in graphs(model.graph) for tensor in graph.initializer]
    return [(tensor.name, onnx.numpy_helper.to_array(tensor)) for tensor in stored]


def optimised_bytes(model: onnx.ModelProto) -> int:
    """Bytes of what a default session of ONNX Runtime has stored after its optimisation."""
    options = onnxruntime.SessionOptions()
    # it warns that what it writes at its highest level is for this machine
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return sum(values.nbytes for _, values in stored_arrays(onnx.load(path)))


def check(of: Program, sizes: tuple[tuple[int, int, int], ...] = ((1, 12, 10), (3, 12, 10), (2, 16, 20))) -> None:
    """Both kinds of input, every form, several batches and image sizes, against the interpreter."""
    cases = [uint8_images(*size) for size in sizes]
    expected = [run(of, images) for images in cases]
    for float_input in (False, True):
        for model in models(of, float_input):
            onnx.checker.check_model(model, full_check=True)
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
            for images, logits in zip(cases, expected, strict=True):
                check_logits(model, normalized(images) if float_input else images, logits)
