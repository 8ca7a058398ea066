"""Networks in int8 as C: every path gives the bits of the integer interpreter, under every compiler and sanitizer."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import dacnn
import foreign
import integer_interpreter
from boards import BOARDS, on_board
from c_networks import SANITIZED, check_int8, images_for, integers_of, network_of, side_by_side, tool
from dacnn.config import NetworkConfig
from dacnn.deploy.c.build import write
from dacnn.deploy.c.integer_arrays import SLACK
from dacnn.deploy.c.integer_source import to_c_int8
from dacnn.deploy.c.integer_translate import translate_integers
from dacnn.deploy.c.target import Microcontroller, footprint
from dacnn.deploy.integers.calibrate import calibrate
from dacnn.deploy.integers.program import IntegerProgram, Sum
from dacnn.deploy.lower import lower
from dacnn.deploy.program import (
    Activate,
    Add,
    AveragePool,
    Convolve,
    GlobalAverage,
    MaxPool,
    Multiply,
    Rotate,
    StoredKernel,
)
from dacnn.errors import ConfigError, DeployError
from dacnn.networks.adapted import Adapted
from dacnn.networks.factory import adapted_as
from dacnn.networks.plan import Input
from dacnn.networks.zoo import DESIGNS
from fuzz_c import BATCH, tasks
from onnx_programs import drawn, program
from reference import one_thread  # noqa: F401  (a fixture)

CLASSES = ("a", "b", "c")


def made(name: str, **settings: Any) -> IntegerProgram:
    return integers_of(lower(network_of(name, CLASSES, **settings)))


def test_every_network_of_the_zoo_gives_the_same_bits() -> None:
    check_int8({"zoo": integers_of(side_by_side(lower(network_of(name, CLASSES, width=4)) for name in DESIGNS))})


@pytest.mark.parametrize(
    ("cc", "flags"), [("gcc", ("-O2",)), ("clang", ("-O1",)), ("gcc", SANITIZED), ("gcc", ("-O1", "-Dnet0_PORTABLE"))]
)
def test_residuals_regulators_and_whole_blocks_give_the_same_bits(cc: str, flags: tuple[str, ...]) -> None:
    check_int8({"dacnn18": made("dacnn18", width=16, regulator="low-rank", regulator_rank=3)}, cc, flags)


@pytest.mark.parametrize("share", ["template", "repeat", "stage", "none"])
def test_kernels_that_are_made_of_others_give_the_same_bits(share: str) -> None:
    check_int8({share: made("dacnn5", width=16, share=share), f"narrow {share}": made("dacnn7", width=6, share=share)})


@pytest.mark.parametrize(("weight", "by_winograd"), [(114, True), (127, False)])
def test_the_largest_sums_give_the_same_bits(weight: int, by_winograd: bool) -> None:
    """Winograd's products are counted modulo 2^32: up to 2^25 a sum is exact, and beyond that it is not asked."""
    of = made("dacnn3", width=128)
    tensors = {name: np.full_like(kernel, weight) for name, kernel in of.tensors.items() if kernel.shape[1:] == (128, 3, 3)}
    for kernel in tensors.values():
        # weights of channels for themselves stand apart
        kernel[range(128), range(128), 1, 1] = 0
    saturated = dataclasses.replace(of, tensors={**of.tensors, **tensors})
    transformed = translate_integers(saturated).transformed
    assert bool(transformed) is by_winograd
    check_int8({str(weight): saturated}, flags=("-O2",))


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
    check_int8({name: integers_of(program(*one, **tensors)) for name, one in steps.items()})


def test_a_converted_network_with_depthwise_kernels_gives_the_same_bits() -> None:
    import transformers

    config = transformers.MobileNetV1Config(num_labels=3, depth_multiplier=0.25)
    module = foreign.stirred(transformers.MobileNetV1ForImageClassification(config))
    network = adapted_as(NetworkConfig(name="foreign.py:make", share="all"), Input(33, 33), CLASSES, module)
    check_int8({"MobileNetV1": integers_of(lower(network))}, flags=("-O1",))


@pytest.mark.parametrize("seed", [0, 1])
def test_any_plan_gives_the_same_bits(seed: int) -> None:
    for programs, cc, _ in tasks(BATCH, seed, turn=seed):
        check_int8({name: integers_of(one) for name, one in programs.items()}, cc)


@pytest.mark.parametrize("board", BOARDS)
def test_an_emulated_board_gives_the_bits_of_the_host(board: str, tmp_path: Path) -> None:
    one = made("dacnn18", width=4, regulator="pointwise")
    images = images_for(one)
    write(to_c_int8(one, name="net"), tmp_path)
    assert on_board(board, images, tmp_path) == integer_interpreter.run(one, images).tobytes()


def test_a_network_of_width_32_fits_into_a_board_of_128_kilobytes(tmp_path: Path) -> None:
    one = made("dacnn14", width=32)
    images = images_for(one)
    write(to_c_int8(one, name="net"), tmp_path)
    assert on_board("netduinoplus2", images, tmp_path) == integer_interpreter.run(one, images).tobytes()


@pytest.mark.parametrize("target", get_args(Microcontroller))
def test_flash_is_int8_kernels_and_little_code_and_ram_is_what_the_header_says(target: Microcontroller) -> None:
    tool("arm-none-eabi-gcc")
    one = made("dacnn14", width=32)
    files = to_c_int8(one, name="net")
    size = footprint(files, target)
    stored = one.kernel_bytes + one.layer_bytes
    assert stored < size.flash_bytes < 1.1 * stored + 24 * 1024
    # context, image and logits; a few bytes are the linker's, to align
    stated = files.portable_workspace_bytes + 4 + 32 * 32 * 3 + 4 * len(CLASSES)
    assert stated <= size.ram_bytes <= stated + 16


def test_kernels_take_a_quarter_and_a_layer_six_bytes_a_channel() -> None:
    flat = lower(network_of("dacnn14", CLASSES, width=16))
    one = integers_of(flat)
    kernels = sum(tensor.size for tensor in flat.tensors.values() if tensor.ndim > 1)
    channels = sum(len(step.store.m) for step in one.steps if isinstance(step, Sum))
    calls = translate_integers(one)
    stored = sum(values.nbytes for kind, values in calls.arrays.values() if kind == "int8_t")
    # three colours are filled up to four, and vectors are read over the end
    assert stored <= kernels + 9 * 16 + SLACK * len(calls.arrays)
    assert sum(part.nbytes for part in (*calls.factors, *calls.addends)) == 6 * channels


def test_an_export_in_int8_tells_how_far_it_is_from_the_network(tmp_path: Path) -> None:
    network = network_of("dacnn7", CLASSES, width=8)
    images = torch.from_numpy(images_for(lower(network)))
    done = dacnn.export(network, "c", tmp_path / "net.c", dtype="int8", calibration=images, build=True, images=images)
    assert 1e-5 < done.parity.max_error < 0.2
    logits = dacnn.runtime.load(tmp_path / "net.so")(images.numpy())
    np.testing.assert_array_equal(logits, dacnn.runtime.load(tmp_path / "net.so", "portable")(images.numpy()))
    # ranges that were learnt need no images
    network.ranges = calibrate(lower(network), images)
    again = dacnn.export(network, "c", tmp_path / "net.c", dtype="int8", images=images)
    assert again.parity == done.parity


def test_what_int8_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    network = network_of("dacnn3", CLASSES, width=4)
    images = torch.from_numpy(images_for(lower(network)))
    cases: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
        (DeployError, "has no ranges of its values", "c", {}),
        (DeployError, "expected 1 or more uint8 images of 32 x 32 x 3", "c", {"calibration": images[:0]}),
        (DeployError, "expected 1 or more uint8 images of 32 x 32 x 3", "c", {"calibration": images[:, 1:]}),
        (
            ConfigError,
            "dtype is 'int8', which 'onnx' does not take.*or export to 'c' or 'wasm'",
            "onnx",
            {"calibration": images},
        ),
        (ConfigError, "int8 chooses its convolutions itself", "c", {"calibration": images, "winograd": "off"}),
        (ConfigError, "float32 has nothing to calibrate", "c", {"calibration": images, "dtype": "float32"}),
    ]
    for kind, said, to, settings in cases:
        with pytest.raises(kind, match=said) as caught:
            dacnn.export(network, to, tmp_path / "net.c", **({"dtype": "int8"} | settings))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_code_that_gives_other_bits_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = network_of("dacnn3", CLASSES, width=4)
    images = torch.from_numpy(images_for(lower(network)))
    monkeypatch.setattr("dacnn.deploy.c.same_bits.IntegerRun", lambda program: lambda images: torch.zeros(len(images), 3))
    with pytest.raises(DeployError, match="'portable' code gives other logits than the integers"):
        dacnn.export(network, "c", tmp_path / "net.c", dtype="int8", calibration=images)
    assert list(tmp_path.iterdir()) == []


class Flattened(torch.nn.Module):
    """Reads several flattened pixels beside features of other origin, or by kernels that are made while running."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.convolution = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.features = torch.nn.Linear(128, 128)
        self.head = torch.nn.Linear(128, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolution(x).relu().flatten(1)
        if self.kind == "residual":
            x = (x + self.features(x)).relu()
        elif self.kind == "gated":
            x = x * torch.sigmoid(self.features(x))
        elif self.kind == "affine":
            x = x * 0.5 + 0.25
        y: torch.Tensor = self.head(x)
        return y


@pytest.mark.parametrize("kind", ["plain", "affine", "residual", "gated"])
def test_flattened_pixels_are_features_in_their_order(kind: str) -> None:
    torch.manual_seed(0)
    network = Adapted(Flattened(kind), Input(8, 8), CLASSES)
    check_int8({kind: integers_of(lower(network))}, "gcc", ("-O1",))
