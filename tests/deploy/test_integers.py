"""Integer programs: the same bits whoever computes them, and close to the floats that they stand for."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

import foreign
import integer_interpreter
import interpreter
from dacnn.config import NetworkConfig
from dacnn.deploy.fusion import Stored, summed
from dacnn.deploy.integers.calibrate import calibrate
from dacnn.deploy.integers.program import IntegerProgram, Sum
from dacnn.deploy.integers.quantize import quantize
from dacnn.deploy.integers.run import IntegerRun
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
    ScaleShift,
    Step,
)
from dacnn.errors import DeployError
from dacnn.networks.factory import adapted_as
from dacnn.networks.network import Network, create
from dacnn.networks.plan import Input, Plan
from onnx_programs import drawn, program, uint8_images
from reference import PLACES, REGULATORS, one_thread, plans, randomise, rank_of  # noqa: F401  (a fixture)

# of the logits, root mean square: a few rounding errors of 1 / 256 each, and eight inaccurate channels
ROUNDING = 0.1
SCHEMES = [None, "stage", "template", "repeat", "none"]


def integers_of(flat: Program, count: int = 6) -> tuple[IntegerProgram, NDArray[np.uint8]]:
    of = flat.input
    images = uint8_images(count, of.height, of.width, of.channels)
    return quantize(flat, calibrate(flat, torch.from_numpy(images))), images


def check(flat: Program, rounding: float = ROUNDING) -> IntegerProgram:
    """Both evaluators give the same bits, and these are the floats up to rounding."""
    integers, images = integers_of(flat)
    logits = integer_interpreter.run(integers, images)
    np.testing.assert_array_equal(IntegerRun(integers)(torch.from_numpy(images)).numpy(), logits)
    expected = interpreter.run(flat, images)
    error = np.sqrt(np.square(logits - expected).mean() / max(float(np.square(expected).mean()), 1e-12))
    assert error < rounding
    return integers


def network(name: str, **changes: Any) -> Network:
    return randomise(create(name, width=8, num_classes=3, seed=0, **changes))


@pytest.mark.parametrize("name", ["dacnn3", "dacnn14", "dacnn18-mix-reg"])
@pytest.mark.parametrize("share", SCHEMES)
def test_every_scheme_has_an_integer_form(name: str, share: str | None) -> None:
    check(lower(network(name, share=share)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", REGULATORS)
def test_every_regulator_has_an_integer_form(kind: str, place: str) -> None:
    check(lower(network("dacnn18", regulator=kind, regulator_place=place, regulator_rank=rank_of(kind))))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(plan=plans(), seed=st.integers(0, 99))
def test_any_plan_gives_the_same_bits(plan: Plan, seed: int) -> None:
    check(lower(randomise(Network(plan, torch.Generator().manual_seed(seed)), seed)), rounding=np.inf)


@pytest.mark.parametrize(
    ("name", "sizes", "side"),
    [
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 3], "layer_type": "basic"}, 32),
        ("EfficientNet", {"width_coefficient": 0.1, "depth_coefficient": 0.2, "hidden_dim": 128, "image_size": 32}, 32),
        ("MobileNetV1", {"depth_multiplier": 0.25}, 33),
    ],
)
def test_converted_networks_of_transformers(name: str, sizes: dict[str, Any], side: int) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=5, **sizes)
    module = foreign.stirred(getattr(transformers, f"{name}ForImageClassification")(config))
    check(lower(adapted_as(NetworkConfig(name="foreign.py:make", share="all"), Input(side, side), tuple("abcde"), module)))


@pytest.mark.parametrize("kind", ["relu", "sigmoid", "silu", "hardsigmoid", "hardswish", "gelu", "tanh", "clip"])
def test_every_activation_has_an_integer_form(kind: Any) -> None:
    bounds = {"low": -0.5, "high": 1.5} if kind == "clip" else {}
    # with a second reader, it is not taken along by the sum before it
    check(program(Activate("a", "x", kind, **bounds), Add("y", "a", "x")))


@pytest.mark.parametrize(
    "steps",
    [
        (MaxPool("y", "x", (3, 3), (2, 2), (1, 0, 1, 0)),),
        (AveragePool("y", "x", (3, 2), (2, 1)),),
        (Rotate("r", "x", 3), ScaleShift("y", "r", "scale", "shift")),
        (GlobalAverage("g", "x"), Activate("a", "g", "sigmoid"), Multiply("y", "x", "a")),
        (Multiply("y", "x", "x"),),
        (Add("y", "x", "x"),),
        (ScaleShift("s", "x", "scale", None), ScaleShift("t", "x", None, "shift"), Add("u", "s", "t"), Activate("y", "u")),
    ],
)
def test_every_step_has_an_integer_form(steps: tuple[Step, ...]) -> None:
    check(program(*steps, scale=drawn(8) + 1, shift=drawn(8, seed=1)))


def test_a_sum_takes_along_all_that_follows() -> None:
    steps = [step for step in summed(lower(network("dacnn18"))) if isinstance(step, Stored) and isinstance(step.step, Convolve)]
    assert [step.low for step in steps] == [0.0] * len(steps)
    assert sum(step.added is not None for step in steps) == 8


def test_six_bytes_a_channel_and_layer_and_a_quarter_of_the_kernels() -> None:
    flat = lower(network("dacnn14"))
    integers, _ = integers_of(flat)
    channels = sum(len(step.store.m) for step in integers.steps if isinstance(step, Sum))
    assert integers.layer_bytes == 6 * channels
    kernels = [tensor for tensor in flat.tensors.values() if tensor.ndim > 1]
    own = [tensor for tensor in integers.tensors.values() if tensor.dtype == np.int16]
    assert integers.kernel_bytes == sum(kernel.size for kernel in kernels) + sum(tensor.nbytes for tensor in own)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1.0, 1e6])
def test_no_scale_overflows(scale: float) -> None:
    factors = np.full(8, scale, np.float32)
    factors[0] = 1.0
    shifts = np.array([0, 1e9, -1e9, 1e-9, -1, 1, 100, -100], np.float32)
    steps = (ScaleShift("s", "x", "scale", "shift"), Activate("a", "s"), ScaleShift("y", "a", "scale", None))
    check(program(*steps, scale=factors, shift=shifts), rounding=np.inf)


def test_images_of_which_nothing_can_be_learnt_are_refused() -> None:
    flat = program(Rotate("y", "x", 0))
    for shape in [(0, 12, 10, 3), (2, 10, 12, 3), (12, 10, 3)]:
        with pytest.raises(DeployError, match="expected 1 or more uint8 images of 12 x 10 x 3"):
            calibrate(flat, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(DeployError, match="has no range for value"):
        quantize(flat, {})
