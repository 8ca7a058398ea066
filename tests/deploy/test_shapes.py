"""Shapes, live memory and multiply-adds of a Program, against what runs and against sums by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import dacnn
import interpreter
from dacnn.deploy.lower import lower
from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    AveragePool,
    CombinedKernel,
    Convolve,
    Flatten,
    GlobalAverage,
    Linear,
    Loop,
    MaxPool,
    Multiply,
    Normalize,
    Program,
    RepeatedKernel,
    Rotate,
    Row,
    ScaleShift,
    Step,
    StoredKernel,
)
from dacnn.deploy.shapes import kernel_shape, live_bytes, macs, shapes
from dacnn.errors import DeployError
from dacnn.networks.network import create
from dacnn.networks.plan import Input
from reference import one_thread  # noqa: F401  (a fixture)


def program_of(*steps: Step, side: tuple[int, int] = (8, 6)) -> Program:
    """Steps behind the normalised images, x0, 3 channels."""
    shapes_of = {
        "k": (4, 3, 3, 3),
        "square": (4, 4, 3, 3),
        "wide": (5, 4),
        "own": (4,),
        "bank": (2, 4, 3, 3, 3),
        "tile": (2, 1),
    }
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes_of.items()}
    return Program("hand", Input(*side), ("a",), (Normalize("x0", IMAGES), *steps), steps[-1].out, tensors)


STEPS = (
    Convolve("x1", "x0", StoredKernel("k"), stride=(2, 1), padding=(1, 0, 2, 3), dilation=(1, 2)),
    ScaleShift("x2", "x1", "own", None),
    MaxPool("x3", "x2", (3, 2), (1, 2), (1, 0, 0, 1)),
    Convolve("x4", "x3", StoredKernel("square"), padding=(1, 1, 1, 1)),
    Add("x5", "x4", "x3"),
    AveragePool("x6", "x5", (2, 1), (1, 1)),
    Rotate("x7", "x6", 1),
    GlobalAverage("x8", "x7"),
    Multiply("x9", "x7", "x8"),
    GlobalAverage("x10", "x9"),
    Flatten("x11", "x10"),
    Linear("x12", "x11", StoredKernel("wide")),
    Activate("x13", "x12"),
)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 6), (2, 9, 7), (3, 16, 16)])
def test_shapes_are_those_of_what_is_computed(batch: int, height: int, width: int) -> None:
    program = program_of(*STEPS)
    found = shapes(program, batch, height, width)
    run = interpreter._Run(program)
    run.values[IMAGES] = np.zeros((batch, height, width, 3), np.uint8)
    run.steps(program.steps, turn=None)
    assert found == {name: value.shape for name, value in run.values.items()}


def test_the_images_are_of_the_inputs_size_where_none_is_given() -> None:
    program = program_of(*STEPS)
    assert shapes(program) == shapes(program, 1, 8, 6)


def test_kernels_that_are_expressions_have_the_shape_of_what_they_give() -> None:
    tensors = program_of(*STEPS).tensors
    assert kernel_shape(StoredKernel("k"), tensors) == (4, 3, 3, 3)
    assert kernel_shape(CombinedKernel("bank", "own"), tensors) == (4, 3, 3, 3)
    assert kernel_shape(RepeatedKernel("k", "tile", "tile"), tensors) == (8, 3, 3, 3)
    assert kernel_shape(StoredKernel(Row("bank")), tensors) == (4, 3, 3, 3)


def test_an_image_that_is_too_small_is_refused_with_the_step() -> None:
    program = lower(create("dacnn14", width=4))
    with pytest.raises(DeployError, match=r"'dacnn14' cannot take images of 16x31: step '.* = max-pool .*' gets 1 x 4 x 1 x 1"):
        shapes(program, height=16, width=31)
    assert shapes(program, height=33, width=70)[program.result] == (1, 10)
    with pytest.raises(DeployError, match="1 images of 0x32"):
        shapes(program, height=0)


def test_a_window_that_is_larger_than_the_image_gives_nothing() -> None:
    # one less than a window, and a stride of two: (2 - 3) // 2 + 1 is 0, and so it must be for a stride that is longer
    for stride in (1, 2, 5):
        program = program_of(MaxPool("x1", "x0", (3, 3), (stride, stride)))
        with pytest.raises(DeployError, match="cannot take images of 2x2"):
            shapes(program, height=2, width=2)


def test_features_of_an_image_of_another_size_do_not_fit_a_linear_step() -> None:
    program = program_of(MaxPool("x1", "x0"), Flatten("x2", "x1"), Linear("x3", "x2", StoredKernel("wide")), side=(2, 2))
    program = dataclasses.replace(program, tensors={"wide": np.ones((5, 3), np.float32)})
    assert shapes(program)["x3"] == (1, 5)
    with pytest.raises(DeployError, match=r"step 'x3 = multiply x2 by wide' gets 1 x 12: expected images of 2x2"):
        shapes(program, height=4, width=4)


def test_values_that_do_not_meet_are_refused() -> None:
    with pytest.raises(DeployError, match="gets 1 x 3 x 8 x 6 and 1 x 3 x 4 x 3"):
        shapes(program_of(MaxPool("x1", "x0"), Add("x2", "x0", "x1")))


def test_a_program_with_loops_is_refused() -> None:
    program = program_of(Activate("x1", "x0"))
    looped = dataclasses.replace(program, steps=(*program.steps, Loop((1,), (), ())))
    with pytest.raises(DeployError, match="'hand' has loops"):
        macs(looped)


# 8 x 6 pixels: the images 144 bytes, normalised 144 values, 4 channels 192 values
@pytest.mark.parametrize(
    ("steps", "values"),
    [
        pytest.param([Activate("x1", "x0")], 144, id="in place"),
        pytest.param([Rotate("x1", "x0", 1)], 288, id="not in place"),
        pytest.param([Convolve("x1", "x0", StoredKernel("k"), padding=(1, 1, 1, 1))], 144 + 192, id="convolution"),
        pytest.param([Activate("x1", "x0"), Add("x2", "x0", "x1")], 288, id="read afterwards"),
        pytest.param([Rotate("x1", "x0", 1), Add("x2", "x0", "x1"), Activate("x3", "x2")], 288, id="sum over its operand"),
        pytest.param([Add("x1", "x0", "x0")], 144, id="with itself"),
        pytest.param([GlobalAverage("x1", "x0"), Multiply("x2", "x0", "x1")], 147, id="product over the images"),
        pytest.param(
            [Flatten("x1", "x0"), GlobalAverage("x2", "x0"), Flatten("x3", "x2"), Activate("x4", "x1")], 147, id="flat"
        ),
        pytest.param(
            [
                Convolve("x1", "x0", StoredKernel("k"), padding=(1, 1, 1, 1)),
                ScaleShift("x2", "x1", "own", "own"),
                Activate("x3", "x2"),
                Convolve("x4", "x3", StoredKernel("square"), padding=(1, 1, 1, 1)),
                Convolve("x5", "x4", StoredKernel("square"), padding=(1, 1, 1, 1)),
                Add("x6", "x5", "x3"),
            ],
            3 * 192,
            id="block",
        ),
    ],
)
def test_the_live_memory_is_the_largest_sum_of_what_is_needed_at_one_time(steps: list[Step], values: int) -> None:
    program = program_of(*steps)
    # while they are normalised, the images are there too
    assert live_bytes(program) == max(4 * values, 144 + 4 * 144)
    assert live_bytes(program, batch=3, bytes_per_value=2) == 3 * max(2 * values, 144 + 2 * 144)


def test_live_memory_follows_the_size_of_the_images() -> None:
    program = lower(create("dacnn18", width=4))
    assert live_bytes(program, height=64, width=32) == 2 * live_bytes(program)


@pytest.mark.parametrize("changes", [{}, {"share": "repeat"}, {"share": "template"}, {"regulator": "depthwise"}], ids=str)
def test_multiply_adds_are_those_of_the_network(changes: dict[str, str]) -> None:
    network = create("dacnn18", width=8, depths=(1, 1), **changes)
    assert macs(lower(network)) == dacnn.count(network).macs


def test_multiply_adds_by_hand() -> None:
    program = program_of(*STEPS[:2], side=(8, 6))
    # rows: (8 + 3 - 3) // 2 + 1 = 5; columns, of every other pixel: 6 + 3 - 5 + 1 = 5
    assert shapes(program)["x1"] == (1, 4, 5, 5)
    assert macs(program) == 4 * 3 * 3 * 3 * 5 * 5
    assert macs(lower(create("dacnn3", width=4))) == 32 * 32 * (4 * 3 * 9 + 4 * 4 * 9) + 16 * 16 * 4 * 4 * 9 + 40


def test_the_smallest_memory_is_that_of_two_activations_in_a_chain() -> None:
    torch.manual_seed(0)
    program = lower(create("dacnn14", width=128))
    assert live_bytes(program) == 2 * 4 * 128 * 32 * 32
    assert math.prod(shapes(program)["x1"]) == 128 * 32 * 32
