"""The int8 templates, by themselves: every path gives the bits of the NumPy interpreter, under both compilers."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import integer_interpreter
from dacnn.deploy.integers.calibrate import calibrate
from dacnn.deploy.integers.program import IntegerProgram
from dacnn.deploy.integers.quantize import quantize
from dacnn.deploy.lower import lower
from dacnn.deploy.program import (
    Activate,
    Add,
    AveragePool,
    Convolve,
    GlobalAverage,
    MaxPool,
    Multiply,
    Program,
    Rotate,
    Step,
    StoredKernel,
)
from dacnn.networks.network import create
from int8_harness import Compiled, paths
from onnx_programs import drawn, program, uint8_images
from reference import randomise

SANITIZED = ("-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover=all")


def integers_of(flat: Program) -> tuple[IntegerProgram, NDArray[np.uint8]]:
    images = uint8_images(2, flat.input.height, flat.input.width, flat.input.channels)
    return quantize(flat, calibrate(flat, torch.from_numpy(images))), images


def check(flat: Program, compiler: str = "gcc", flags: tuple[str, ...] = ("-O2",)) -> None:
    integers, images = integers_of(flat)
    expected = integer_interpreter.run(integers, images)
    compiled = Compiled(integers, compiler, flags)
    for path in paths():
        np.testing.assert_array_equal(compiled(images, path), expected, err_msg=path)


def network(name: str, width: int, **changes: Any) -> Program:
    return lower(randomise(create(name, width=width, num_classes=3, seed=0, **changes)))


@pytest.mark.parametrize(("compiler", "flags"), [("gcc", ("-O3",)), ("clang", ("-O2",)), ("gcc", SANITIZED)])
def test_a_network_of_whole_blocks_gives_the_same_bits_on_every_path(compiler: str, flags: tuple[str, ...]) -> None:
    check(network("dacnn7", 64), compiler, flags)


@pytest.mark.parametrize("width", [8, 16, 32])
def test_residuals_and_other_widths_give_the_same_bits(width: int) -> None:
    check(network("dacnn18", width, regulator="low-rank", regulator_rank=3))


@pytest.mark.parametrize("share", ["template", "repeat"])
def test_kernels_that_are_made_of_others_give_the_same_bits(share: str) -> None:
    check(network("dacnn5", 16, share=share))


@pytest.mark.parametrize(
    "steps",
    [
        (Convolve("y", "x", StoredKernel("a"), (2, 1), (1, 0, 2, 1), (1, 2)),),
        (Convolve("y", "x", StoredKernel("grouped"), padding=(1, 1, 1, 1), groups=2),),
        (Convolve("y", "x", StoredKernel("depthwise"), padding=(1, 1, 1, 1), groups=8),),
        (Convolve("s", "x", StoredKernel("a"), padding=(1, 1, 1, 1)), MaxPool("y", "s", (3, 3), (2, 2), (1, 0, 1, 0))),
        (AveragePool("y", "x", (3, 2), (2, 1)),),
        (GlobalAverage("g", "x"), Activate("s", "g", "sigmoid"), Multiply("y", "x", "s")),
        (Activate("s", "x", "gelu"), Rotate("r", "x", 3), Add("t", "s", "r"), Multiply("y", "t", "x")),
    ],
)
def test_every_step_gives_the_same_bits(steps: tuple[Step, ...]) -> None:
    check(program(*steps, a=drawn(8, 8, 3, 3), grouped=drawn(8, 4, 3, 3), depthwise=drawn(8, 1, 3, 3)), flags=SANITIZED)
