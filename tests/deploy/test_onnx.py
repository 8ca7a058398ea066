"""Every operation of a program, written as ONNX, gives in ONNX Runtime what the interpreter gives."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import dacnn.deploy.onnx.model
from dacnn.deploy.onnx.model import to_onnx, to_onnx_loop
from dacnn.deploy.program import (
    Activate,
    Add,
    AveragePool,
    Carried,
    CombinedKernel,
    Convolve,
    Flatten,
    GlobalAverage,
    Linear,
    Loop,
    MaxPool,
    Multiply,
    Program,
    RepeatedKernel,
    Rotate,
    ScaleShift,
    StoredKernel,
)
from dacnn.errors import DeployError
from onnx_programs import CLASSES, INPUT, C, check, drawn, models, program, runtime_logits, uint8_images

OPERATIONS: dict[str, Program] = {
    "convolve": program(Convolve("y", "x", StoredKernel("k"), padding=(1, 1, 1, 1)), k=drawn(C, C, 3, 3)),
    "stride": program(Convolve("y", "x", StoredKernel("k"), stride=(2, 1), padding=(1, 1, 1, 1)), k=drawn(C, C, 3, 3)),
    "uneven padding": program(Convolve("y", "x", StoredKernel("k"), padding=(0, 1, 2, 3)), k=drawn(C, C, 3, 3)),
    "no padding, uneven kernel": program(Convolve("y", "x", StoredKernel("k")), k=drawn(C, C, 1, 5)),
    "dilation": program(Convolve("y", "x", StoredKernel("k"), padding=(2, 1, 2, 1), dilation=(2, 1)), k=drawn(C, C, 3, 3)),
    "groups": program(Convolve("y", "x", StoredKernel("k"), padding=(1, 1, 1, 1), groups=2), k=drawn(C, C // 2, 3, 3)),
    "depthwise": program(Convolve("y", "x", StoredKernel("k"), padding=(1, 1, 1, 1), groups=C), k=drawn(C, 1, 3, 3)),
    "wider": program(Convolve("y", "x", StoredKernel("k")), channels=16, k=drawn(16, C, 1, 1)),
    "scale and shift": program(ScaleShift("y", "x", "a", "b"), a=drawn(C), b=drawn(C, seed=1)),
    "scale": program(ScaleShift("y", "x", "a", None), a=drawn(C)),
    "shift": program(ScaleShift("y", "x", None, "b"), b=drawn(C)),
    "neither": program(ScaleShift("y", "x", None, None)),
    "clip": program(Activate("y", "x", "clip", -0.25, 0.5)),
    "clip below": program(Activate("y", "x", "clip", low=-0.25)),
    "clip above": program(Activate("y", "x", "clip", high=0.5)),
    **{
        kind: program(Activate("y", "x", kind))
        for kind in ("relu", "sigmoid", "silu", "hardsigmoid", "hardswish", "gelu", "tanh")
    },
    "max-pool": program(MaxPool("y", "x")),
    "padded max-pool": program(MaxPool("y", "x", (3, 3), (2, 2), (1, 1, 0, 1))),
    "average-pool": program(AveragePool("y", "x", (3, 2), (2, 1))),
    "rotate": program(Rotate("y", "x", 1)),
    "rotate back": program(Rotate("y", "x", -3)),
    "rotate around": program(Rotate("y", "x", 2 * C + 1)),
    "rotate not": program(Rotate("y", "x", 0)),
    "add": program(Activate("r", "x"), Add("y", "r", "x")),
    "multiply": program(Activate("r", "x"), Multiply("y", "r", "x")),
    "multiply by means": program(GlobalAverage("m", "x"), Multiply("y", "x", "m")),
    "multiply means": program(GlobalAverage("m", "x"), Multiply("y", "m", "x")),
    "combine": program(
        *(
            Convolve(out, x, CombinedKernel("bank", co), padding=(1, 1, 1, 1))
            for out, x, co in (("r", "x", "c"), ("y", "r", "d"))
        ),
        bank=drawn(3, C, C, 3, 3),
        c=drawn(3),
        d=drawn(3, seed=1),
    ),
    "repeat": program(
        Convolve("y", "x", RepeatedKernel("base", "g", "s"), padding=(1, 1, 1, 1)),
        channels=12,
        base=drawn(4, 4, 3, 3),
        g=drawn(3, 2),
        s=drawn(3, 2, seed=1),
    ),
    "repeat what is read as it is": program(
        Convolve("r", "x", StoredKernel("base")),
        Convolve("y", "r", RepeatedKernel("base", "g", "s")),
        base=drawn(C, C, 3, 3),
        g=drawn(1, 1),
        s=drawn(1, 1, seed=1),
    ),
    "linear combine and repeat": program(
        GlobalAverage("m", "x"),
        Flatten("f", "m"),
        Linear("u", "f", CombinedKernel("bank", "c")),
        Linear("v", "u", RepeatedKernel("base", "g", "s")),
        ScaleShift("w", "v", "a", "b"),
        Activate("y", "w"),
        averaged=True,
        bank=drawn(3, 6, C),
        c=drawn(3),
        base=drawn(4, 3),
        g=drawn(2, 2),
        s=drawn(2, 2, seed=1),
        a=drawn(8),
        b=drawn(8, seed=1),
    ),
    "names that are taken": program(
        Convolve("logits", "x", StoredKernel("kernel")),
        Activate("kernel.shape", "logits"),
        Activate("y", "kernel.shape"),
        kernel=drawn(C, C, 1, 1),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_the_interpreter_gives(name: str) -> None:
    check(OPERATIONS[name])


TINY = program(
    Convolve("r", "x", StoredKernel("anchors.k"), padding=(1, 1, 1, 1)),
    ScaleShift("s", "r", "a", "b"),
    Convolve("t", "s", StoredKernel("anchors.k"), padding=(1, 1, 1, 1)),
    Activate("y", "t"),
    anchors_k=drawn(C, C, 3, 3),
    a=drawn(C),
    b=drawn(C, seed=1),
)


def test_the_file_says_what_the_network_takes_and_gives() -> None:
    model = to_onnx(TINY)
    (images,), (logits,) = model.graph.input, model.graph.output
    sides = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert (images.name, sides) == ("images", ["N", "H", "W", 3])
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim] == ["N", len(CLASSES)]
    assert (model.producer_name, model.producer_version) == ("dacnn", dacnn.__version__)
    described = json.loads({entry.key: entry.value for entry in model.metadata_props}["dacnn"])
    assert described["name"] == "tiny" and tuple(described["classes"]) == CLASSES
    of = described["input"]
    assert (of["height"], of["width"], of["channels"], of["fit"]) == (12, 10, 3, "pad")
    assert (tuple(of["mean"]), tuple(of["std"])) == (INPUT.mean, INPUT.std)


def test_a_file_may_take_normalised_floats_instead() -> None:
    (images,) = to_onnx(TINY, float_input=True).graph.input
    assert [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim] == ["N", 3, "H", "W"]
    assert images.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_program_that_flattens_pixels_takes_images_of_its_size_only() -> None:
    pixels = C * INPUT.height * INPUT.width
    flattened = program(Flatten("y", "x"), channels=pixels, averaged=True)
    for model in models(flattened, float_input=False):
        (images,) = model.graph.input
        assert [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim] == ["N", 12, 10, 3]
    check(flattened, sizes=((1, 12, 10), (3, 12, 10)))


def test_a_program_that_holds_for_one_size_takes_images_of_its_size_only() -> None:
    for model in models(dataclasses.replace(TINY, any_size=False), float_input=False):
        (images,) = model.graph.input
        assert [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim] == ["N", 12, 10, 3]


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_tensor_is_stored_once_and_nothing_else_of_size(name: str) -> None:
    of = OPERATIONS[name]
    for model in models(of, float_input=False):
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert len(stored) == len(model.graph.initializer)
        for tensor, values in of.tensors.items():
            assert stored.pop(tensor).tobytes() == values.tobytes()
        assert all(values.nbytes <= 48 for values in stored.values())
        assert model.ByteSize() <= 1.05 * of.stored_bytes + 32 * 1024


def test_the_same_program_gives_the_same_bytes() -> None:
    assert to_onnx(TINY).SerializeToString() == to_onnx(TINY).SerializeToString()


def test_no_batch_norm_is_left_for_a_runtime_to_fold() -> None:
    assert {"Mul", "Add"} <= {node.op_type for node in to_onnx(TINY).graph.node}
    assert "BatchNormalization" not in {node.op_type for node in to_onnx(TINY).graph.node}


def test_a_tensor_may_lie_in_memory_in_any_way(tmp_path: Path) -> None:
    turned = {name: np.asfortranarray(tensor) for name, tensor in TINY.tensors.items()}
    other = Program(TINY.name, TINY.input, TINY.classes, TINY.steps, TINY.result, turned)
    onnx.save(to_onnx(other), tmp_path / "model.onnx")
    images = uint8_images(2)
    assert np.array_equal(runtime_logits(onnx.load(tmp_path / "model.onnx"), images), runtime_logits(to_onnx(TINY), images))


def test_loops_are_refused_in_the_flat_form() -> None:
    rolled = program(Loop((2,), (Carried("y", "x", "r"),), (Activate("r", "y"),)))
    with pytest.raises(DeployError, match="program 'tiny' has loops: expected the flat one"):
        to_onnx(rolled)


def test_what_one_file_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dacnn.deploy.onnx.model, "_LARGEST_BYTES", 100)
    with pytest.raises(DeployError, match="bytes of tensors: expected at most 100"):
        to_onnx_loop(TINY)


def test_without_the_onnx_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DeployError, match=r"pip install 'dacnn\[export\]'"):
        to_onnx(TINY)
