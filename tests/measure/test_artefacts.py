"""Every format is read without running anything in it; whatever is no artefact is refused by name, in one line."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dacnn.errors import ArtefactError, DacnnError
from dacnn.measure.artefacts import read_artefact
from dacnn.measure.audit import audit
from dacnn.measure.pt2 import code_in
from dacnn.measure.stored import StoredArray

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

KERNEL = np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32)


class Harmful:
    """A pickle that would write a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def arrays(path: Path) -> dict[str, StoredArray]:
    return {name: array for array in read_artefact(path).arrays for name in array.names}


def refused(path: Path) -> str:
    """The one line with which a file is refused; it names the file."""
    with pytest.raises(DacnnError) as caught:
        audit(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def model(*initialisers: TensorProto, nodes: Any = (), functions: Any = ()) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8, 8])
    nodes = nodes or [helper.make_node("Conv", ["x", initialisers[0].name], ["y"])]
    end = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [value], [end], list(initialisers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], functions=functions, ir_version=10)


def program(path: Path, module: nn.Module, **settings: Any) -> Path:
    torch.export.save(torch.export.export(module.eval(), (torch.zeros(2, 3, 8, 8),), **settings), path)
    return path


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.constant = torch.from_numpy(KERNEL)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(self.first(x), self.constant).mean((2, 3))


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
)
def test_every_type_is_read_from_tensors_with_the_bytes_it_takes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (20 * torch.from_numpy(KERNEL)).to(dtype)
    torch.save({"kernel": tensor}, tmp_path / "a.pt")
    safetensors.torch.save_file({"kernel": tensor}, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
        read = arrays(path)["kernel"]
        assert read.dtype == str(dtype).removeprefix("torch.") and read.nbytes == tensor.nbytes
        np.testing.assert_array_equal(read.values.astype(np.float64), tensor.double().numpy())


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8])
def test_every_type_is_read_from_onnx(kind: int, tmp_path: Path) -> None:
    values = (20 * KERNEL).astype(helper.tensor_dtype_to_np_dtype(kind))
    tensor = helper.make_tensor("kernel", kind, values.shape, values.tobytes(), raw=True)
    onnx.save(model(tensor), tmp_path / "a.onnx")
    onnx.save(model(tensor), tmp_path / "b.onnx", save_as_external_data=True, location="b.data", size_threshold=0)
    for name in ("a.onnx", "b.onnx"):
        read = arrays(tmp_path / name)["kernel"]
        assert read.nbytes == values.nbytes and read.readers == 1
        np.testing.assert_array_equal(read.values.astype(np.float32), values.astype(np.float32))


def test_tensors_are_found_however_deep_and_other_values_are_passed_over(tmp_path: Path) -> None:
    kernel = torch.from_numpy(KERNEL)
    content = {"epoch": 3, "model": {"a": kernel, "list": [kernel[:4], (kernel[4:] * 1,)]}, "names": ["x"]}
    torch.save(content, tmp_path / "a.pt")
    assert set(arrays(tmp_path / "a.pt")) == {"model.a", "model.list.0", "model.list.1.0"}
    torch.save(content, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert set(arrays(tmp_path / "old.bin")) == {"model.a", "model.list.0", "model.list.1.0"}


def test_an_onnx_file_is_read_everywhere(tmp_path: Path) -> None:
    def constant(name: str) -> Any:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(KERNEL, f"{name} value"))

    body = helper.make_graph(
        [constant("in loop"), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
        [numpy_helper.from_array(2 * KERNEL, "of loop")],
    )
    function = helper.make_function("own", "F", ["a"], ["b"], [constant("b")], [helper.make_opsetid("", 20)])
    nodes = [
        constant("in graph"),
        helper.make_node("Loop", ["", ""], [], body=body),
        helper.make_node("Conv", ["x", "initialiser"], ["y"]),
    ]
    onnx.save(model(numpy_helper.from_array(KERNEL, "initialiser"), nodes=nodes, functions=[function]), tmp_path / "a.onnx")
    (kernel,) = audit(tmp_path / "a.onnx").kernels
    assert {one.names[0]: one.place for one in kernel.copies} == {
        "initialiser": "initialiser",
        "in graph": "Constant node",
        "in loop": "Constant node in Loop body",
        "of loop": "initialiser in Loop body",
        "b": "Constant node in function F",
    }


def test_external_data_that_two_names_share_is_stored_once(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(KERNEL.tobytes())
    tensors = [external(name, "data.bin") for name in ("a", "b")]
    nodes = [helper.make_node("Conv", ["x", name], [f"y{name}"]) for name in ("a", "b")]
    onnx.save(model(*tensors, nodes=nodes), tmp_path / "a.onnx")
    (kernel,) = audit(tmp_path / "a.onnx").kernels
    assert [one.names for one in kernel.copies] == [("a", "b")] and kernel.copies[0].readers == 2


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=KERNEL.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_a_pt2_file_gives_weights_and_constants_and_how_often_they_are_read(tmp_path: Path) -> None:
    found = arrays(program(tmp_path / "a.pt2", Convolutions()))
    assert {name: (array.place, array.readers) for name, array in found.items()} == {
        "first.weight": ("weight", 1),
        "constant": ("constant", 1),
    }
    np.testing.assert_array_equal(found["constant"].values, KERNEL)


def test_readers_behind_another_operator_are_not_counted(tmp_path: Path) -> None:
    class Cast(Convolutions):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kernel = self.constant * 2
            x = nn.functional.conv2d(self.first(x), kernel)
            return nn.functional.conv2d(x, kernel).mean((2, 3))

    assert arrays(program(tmp_path / "a.pt2", Cast()))["constant"].readers is None


def test_tied_names_of_a_pt2_file_are_one_copy(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    tied[2].weight = tied[1].weight
    found = audit(program(tmp_path / "a.pt2", tied))
    assert found.single and any(len(one.names) == 2 for kernel in found.kernels for one in kernel.copies)


def test_an_ordinary_pt2_file_brings_no_code(tmp_path: Path) -> None:
    assert code_in(program(tmp_path / "a.pt2", Convolutions())) is None
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    assert code_in(program(tmp_path / "b.pt2", Convolutions(), dynamic_shapes={"x": batch})) is None


def test_only_onnx_files_need_the_onnx_package(tmp_path: Path) -> None:
    safetensors.torch.save_file({"kernel": torch.from_numpy(KERNEL)}, tmp_path / "a.safetensors")
    onnx.save(model(numpy_helper.from_array(KERNEL, "kernel")), tmp_path / "a.onnx")
    script = (
        "import sys; sys.modules['onnx'] = None; import dacnn\n"
        "assert dacnn.audit(sys.argv[1]).single\n"
        "try: dacnn.audit(sys.argv[2])\n"
        "except dacnn.DacnnError as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.safetensors"), str(tmp_path / "a.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pip install 'dacnn[export]'" in done.stdout


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.onnx", None, "no such file"),
        ("a.onnx", b"", "is empty"),
        ("a.onnx", b"no model at all", "not a readable ONNX file"),
        ("a.onnx", b"\x08\x0a", "holds no graph"),
        ("a.pt", b"no pickle", "not read"),
        ("a.pt2", b"no archive", "not a readable .pt2 file"),
        ("a.safetensors", b"no header", "not a readable .safetensors file"),
        ("a.txt", b"some words", "of no known format"),
        ("a.ort", b"\x20\x00\x00\x00ORTM", "of no known format"),
    ],
)
def test_what_is_no_artefact_is_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    assert "no best.safetensors" in refused(tmp_path)


def writers() -> dict[str, Callable[[Path], object]]:
    return {
        "a.safetensors": lambda path: safetensors.torch.save_file({"kernel": torch.from_numpy(KERNEL)}, path),
        "a.pt": lambda path: torch.save({"kernel": torch.from_numpy(KERNEL)}, path),
        "a.pt2": lambda path: program(path, Convolutions()),
        "a.onnx": lambda path: onnx.save(model(numpy_helper.from_array(KERNEL, "kernel")), path),
    }


@pytest.mark.parametrize("part", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("name", list(writers()))
def test_a_truncated_file_is_refused(name: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / name
    writers()[name](path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refused(path)


@pytest.mark.parametrize("ending", ["pt", "bin"])
def test_a_pickle_that_brings_code_is_refused_and_not_run(ending: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"kernel": torch.from_numpy(KERNEL), "more": Harmful(trace)}, tmp_path / f"a.{ending}")
    assert "expected tensors alone" in refused(tmp_path / f"a.{ending}")
    (tmp_path / f"b.{ending}").write_bytes(pickle.dumps(Harmful(trace)))
    assert "expected tensors alone" in refused(tmp_path / f"b.{ending}")
    torch.save(nn.Conv2d(8, 8, 3), tmp_path / f"c.{ending}")
    assert "expected tensors alone" in refused(tmp_path / f"c.{ending}")
    assert not trace.exists()


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A `.pt2` file with entries changed."""
    out = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, change(entry, old.read(entry)))
    return out


def test_code_in_a_pt2_file_is_named_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = program(tmp_path / "a.pt2", Convolutions())
    harmful = io.BytesIO()
    torch.save((Harmful(trace),), harmful)

    def edited(entry: str, of: str, old: str, new: str) -> Callable[[str, bytes], bytes]:
        return lambda name, content: content.replace(old.encode(), new.encode()) if name.endswith(of) else content

    changes = {
        "pickle of more than tensors": lambda name, content: (
            harmful.getvalue() if name.endswith("inputs/model.pt") else content
        ),
        "pickled tensors": edited("", "weights_config.json", '"use_pickle": false', '"use_pickle": true'),
        "guards in Python": edited("", "model.json", '"guards_code": []', '"guards_code": ["1"]'),
        "calls 'torch.os.system'": edited("", "model.json", '"torch.ops.aten.mean.dim"', '"torch.os.system"'),
    }
    for reason, change in changes.items():
        changed = rewritten(path, change)
        assert reason in (code_in(changed) or ""), reason
    # an audit reads weights alone: what stands beside them is neither needed nor touched
    assert audit(rewritten(path, changes["pickle of more than tensors"])).single
    weights = {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}
    config = json.dumps({"config": {"first.weight": weights}}).encode()

    def pickled(name: str, content: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            return config
        return harmful.getvalue() if name.endswith("weights/weight_0") else content

    assert "a pickle of more than tensors" in refused(rewritten(path, pickled))
    assert not trace.exists()


def test_an_expression_that_is_no_arithmetic_counts_as_code(tmp_path: Path) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    path = program(tmp_path / "a.pt2", Convolutions(), dynamic_shapes={"x": batch})

    def change(name: str, content: bytes) -> bytes:
        return content.replace(b"Symbol('s", b"exec('s") if name.endswith("model.json") else content

    assert "the expression" in (code_in(rewritten(path, change)) or "")


@pytest.mark.parametrize("change", ["sizes", "path_name", "dtype", "config"])
def test_a_pt2_file_whose_description_is_damaged_is_refused(change: str, tmp_path: Path) -> None:
    path = program(tmp_path / "a.pt2", Convolutions())

    def damaged(name: str, content: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return content
        table = json.loads(content)
        entry = table["config"]["first.weight"]
        if change == "sizes":
            entry["tensor_meta"]["sizes"][0] = {"as_int": 10**9}
        elif change == "path_name":
            entry["path_name"] = "weight_99"
        elif change == "dtype":
            del entry["tensor_meta"]["dtype"]
        else:
            table = [table]
        return json.dumps(table).encode()

    refused(rewritten(path, damaged))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin", "absent.bin", ""])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(KERNEL.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink(tmp_path / "secret.bin", folder / "link.bin")
    onnx.save(model(external("kernel", location)), folder / "a.onnx")
    message = refused(folder / "a.onnx")
    assert "kernel" in message and "keep the data beside the model" in message


def test_external_data_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(KERNEL.tobytes()[:-4])
    onnx.save(model(external("kernel", "data.bin")), tmp_path / "a.onnx")
    assert "too short" in refused(tmp_path / "a.onnx")


def test_a_module_without_values_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Conv2d(8, 8, 3)
    with pytest.raises(ArtefactError, match="weight: has no values"):
        audit(module)
