"""Networks in int8 as C: every path gives the bits of the integer interpreter, under every compiler and sanitizer."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foreign
import integer_interpreter
from c_networks import compiled, executed, images_for, network_of
from dacnn.config import NetworkConfig
from dacnn.deploy.calibrate import calibrate
from dacnn.deploy.integers import IntegerProgram
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
    StoredKernel,
)
from dacnn.deploy.quantize import quantize
from dacnn.networks.factory import adapt
from dacnn.networks.plan import Input
from dacnn.networks.zoo import DESIGNS
from onnx_programs import drawn, program
from reference import one_thread  # noqa: F401  (a fixture)

CLASSES = ("a", "b", "c")
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BOARD = Path(__file__).parent / "cortex_m"


def integers_of(flat: Program) -> IntegerProgram:
    return quantize(flat, calibrate(flat, torch.from_numpy(images_for(flat, 1))))


def made(name: str, **settings: Any) -> IntegerProgram:
    return integers_of(lower(network_of(name, CLASSES, **settings)))


def check(programs: Mapping[str, IntegerProgram], cc: str = "gcc", flags: Sequence[str] = SANITIZED) -> None:
    of = list(programs.values())
    images = [images_for(one) for one in of]
    with tempfile.TemporaryDirectory() as folder:
        found = executed(of, images, compiled(of, Path(folder), cc, flags))
    for name, one, part, logits_by in zip(programs, of, images, found, strict=True):
        expected = integer_interpreter.run(one, part)
        assert "portable" in logits_by
        for path, logits in logits_by.items():
            np.testing.assert_array_equal(logits, expected, err_msg=f"{name}, {path}")


@pytest.mark.parametrize("name", DESIGNS)
def test_a_network_of_the_zoo_gives_the_same_bits(name: str) -> None:
    check({name: made(name, width=4)})


@pytest.mark.parametrize(
    ("cc", "flags"), [("gcc", ("-O2",)), ("clang", ("-O1",)), ("gcc", SANITIZED), ("gcc", ("-O1", "-Dnet0_PORTABLE"))]
)
def test_residuals_regulators_and_whole_blocks_give_the_same_bits(cc: str, flags: tuple[str, ...]) -> None:
    check({"dacnn18": made("dacnn18", width=16, regulator="low-rank", regulator_rank=3)}, cc, flags)


@pytest.mark.parametrize("share", ["template", "repeat", "stage", "none"])
def test_kernels_that_are_made_of_others_give_the_same_bits(share: str) -> None:
    check({share: made("dacnn5", width=16, share=share), f"narrow {share}": made("dacnn7", width=6, share=share)})


def test_every_step_gives_the_same_bits() -> None:
    steps = {
        "dilated": (Convolve("y", "x", StoredKernel("a"), (2, 1), (1, 0, 2, 1), (1, 2)),),
        "grouped": (Convolve("y", "x", StoredKernel("grouped"), padding=(1, 1, 1, 1), groups=2),),
        "depthwise": (Convolve("y", "x", StoredKernel("depthwise"), padding=(1, 1, 1, 1), groups=8),),
        "pool": (Convolve("s", "x", StoredKernel("a"), padding=(1, 1, 1, 1)), MaxPool("y", "s", (3, 3), (2, 2), (1, 0, 1, 0))),
        "average": (AveragePool("y", "x", (3, 2), (2, 1)),),
        "gate": (GlobalAverage("g", "x"), Activate("s", "g", "sigmoid"), Multiply("y", "x", "s")),
        "pointwise": (Activate("s", "x", "gelu"), Rotate("r", "x", 3), Add("t", "s", "r"), Multiply("y", "t", "x")),
        "doubled": (Add("y", "x", "x"),),
    }
    tensors = {"a": drawn(8, 8, 3, 3), "grouped": drawn(8, 4, 3, 3), "depthwise": drawn(8, 1, 3, 3)}
    check({name: integers_of(program(*one, **tensors)) for name, one in steps.items()})


def test_a_converted_network_with_depthwise_kernels_gives_the_same_bits() -> None:
    import transformers

    config = transformers.MobileNetV1Config(num_labels=3, depth_multiplier=0.25)
    module = foreign.stirred(transformers.MobileNetV1ForImageClassification(config))
    network = adapt(NetworkConfig(name="foreign.py:make", share="all"), Input(33, 33), CLASSES, module)
    check({"MobileNetV1": integers_of(lower(network))}, flags=("-O1",))
