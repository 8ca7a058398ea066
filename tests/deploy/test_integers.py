"""Integer programs: the same bits whoever computes them, and close to the floats that they stand for."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import foreign
import integer_interpreter
import interpreter
from dacnn.config import NetworkConfig
from dacnn.deploy.calibrate import calibrate
from dacnn.deploy.integer_run import IntegerRun
from dacnn.deploy.integers import IntegerProgram, Sum
from dacnn.deploy.lower import lower
from dacnn.deploy.program import (
    Activate,
    Add,
    AveragePool,
    Convolve,
    Flatten,
    GlobalAverage,
    MaxPool,
    Multiply,
    Program,
    Rotate,
    ScaleShift,
    Step,
    StoredKernel,
)
from dacnn.deploy.quantize import quantize
from dacnn.errors import DeployError
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import adapt
from dacnn.networks.network import Network, create
from dacnn.networks.plan import Input, Plan
from dacnn.networks.zoo import DESIGNS
from onnx_programs import drawn, program, uint8_images
from reference import PLACES, REGULATORS, one_thread, plans, randomise, rank_of  # noqa: F401  (a fixture)

# rounding errors of a few layers, in units of the standard deviation of the logits: eight bits are 1 / 128 of the largest value
ROUNDING = 0.1


def check(flat: Program, rounding: float = ROUNDING, count: int = 6) -> IntegerProgram:
    """Both evaluators give the same bits, and these are the floats up to rounding."""
    of = flat.input
    images = uint8_images(count, of.height, of.width, of.channels)
    integers = quantize(flat, calibrate(flat, torch.from_numpy(images)))
    logits = integer_interpreter.run(integers, images)
    np.testing.assert_array_equal(IntegerRun(integers)(torch.from_numpy(images)).numpy(), logits)
    expected = interpreter.run(flat, images)
    error = np.sqrt(np.square(logits - expected).mean() / max(float(np.square(expected).mean()), 1e-12))
    print("ERR", error)
    assert error < rounding
    return integers


def check_network(network: Classifier, rounding: float = ROUNDING) -> IntegerProgram:
    return check(lower(network), rounding)


@pytest.mark.parametrize("name", ["dacnn3", "dacnn14", "dacnn18", "dacnn18-mix-reg"])
@pytest.mark.parametrize("share", [None, "stage", "template", "repeat", "none"])
def test_every_scheme_in_integers(name: str, share: str | None) -> None:
    check_network(randomise(create(name, width=8, num_classes=3, seed=0, share=share)), 9)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", REGULATORS)
def test_every_regulator_in_integers(kind: str, place: str) -> None:
    changes: dict[str, Any] = {"regulator": kind, "regulator_place": place, "regulator_rank": rank_of(kind)}
    check_network(randomise(create("dacnn18", width=8, num_classes=3, seed=0, **changes)), 9)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(plan=plans(), seed=st.integers(0, 99))
def test_any_plan_gives_the_same_bits(plan: Plan, seed: int) -> None:
    check_network(randomise(Network(plan, torch.Generator().manual_seed(seed)), seed), rounding=np.inf)


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
    check_network(adapt(NetworkConfig(name="foreign.py:make", share="all"), Input(side, side), tuple("abcde"), module), np.inf)
