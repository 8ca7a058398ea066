"""The memory that an artefact adds is read in a fresh process, for every format."""

import json
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import dacnn
from dacnn.cli import main
from dacnn.errors import ArtefactError
from dacnn.measure import memory_added as module_under_test
from dacnn.measure.memory_added import memory_added
from dacnn.measure.runtimes import artefact_memory

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps_rollup"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

MIB = 2**20
# what an allocator gives back, rounds up or had to spare from before
SLACK_BYTES = 2 * MIB


class Wide(nn.Module):
    """One kernel of 9 MiB, behind a few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(3, 512, 1)
        self.kernel = nn.Conv2d(512, 512, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(self.widen(x)).mean((2, 3))


WIDE_BYTES = 512 * 512 * 9 * 4


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artefacts")
    wide, images = Wide().eval(), torch.zeros(1, 3, 8, 8)
    torch.save(wide.state_dict(), folder / "a.pt")
    torch.export.save(torch.export.export(wide, (images,)), folder / "a.pt2")
    torch.onnx.export(wide, (images,), folder / "a.onnx", dynamo=True, external_data=False, verbose=False)
    dacnn.save(dacnn.create("dacnn3", width=512), folder / "best.safetensors")
    return {path.suffix: path for path in folder.iterdir()} | {"": folder}


@pytest.mark.parametrize(
    ("ending", "loaded"),
    [
        ("", "the network in PyTorch, one thread, run once"),
        (".safetensors", "the network in PyTorch, one thread, run once"),
        (".pt", "the tensors, not run"),
        (".pt2", "the exported program in PyTorch, one thread, run once"),
        (".onnx", "a session of ONNX Runtime, one thread, run once"),
    ],
)
def test_at_least_the_weights_are_counted(ending: str, loaded: str, artefacts: dict[str, Path]) -> None:
    memory = artefact_memory(artefacts[ending])
    assert memory.loaded.startswith(loaded)
    assert WIDE_BYTES - SLACK_BYTES < memory.anonymous_bytes < 12 * WIDE_BYTES
    assert memory.resident_bytes > WIDE_BYTES - SLACK_BYTES


def test_a_loader_that_keeps_a_known_amount_is_measured_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loader_of_a_test.py").write_text(
        "def load(path):\n    size = 1 if path is None else int(path.read_text())\n    return bytearray(b'1') * size, 'bytes'\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(dacnn.__file__).parents[1]}")
    (tmp_path / "size").write_text(str(50 * MIB))
    memory = memory_added("loader_of_a_test:load", tmp_path / "size")
    assert memory.loaded == "bytes" and abs(memory.anonymous_bytes - 50 * MIB) < MIB


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError) as caught:
        memory_added("dacnn.measure.runtimes:onnx_runtime", tmp_path / "nothing.onnx")
    assert "cannot be loaded to measure its memory" in str(caught.value) and "\n" not in str(caught.value)


def test_a_pt2_file_that_brings_code_is_not_loaded(artefacts: dict[str, Path], tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(artefacts[".pt2"]) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry).replace(b'"torch.ops.aten.mean.dim"', b'"torch.os.system"'))
    with pytest.raises(ArtefactError, match="is not loaded, since it may run code: .* calls 'torch.os.system'"):
        artefact_memory(path)


def test_a_model_that_takes_no_zeros_is_loaded_all_the_same(artefacts: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(artefacts[".onnx"])
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    shape = model.graph.input[0].type.tensor_type.shape
    # a kernel of 3x3 finds nothing in an image of one pixel
    del shape.dim[:]
    for size in (1, 3, 1, 1):
        shape.dim.add(dim_value=size)
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "a.onnx")
    try:
        memory = artefact_memory(tmp_path / "a.onnx")
    except ArtefactError:
        pytest.skip("this ONNX Runtime refuses the model when it loads it")
    assert "not run" in memory.loaded


def test_elsewhere_than_on_linux_it_says_so(artefacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_MAP", Path("/nowhere/smaps_rollup"))
    with pytest.raises(ArtefactError, match="measured on Linux only"):
        artefact_memory(artefacts[".pt"])


def test_the_command_reports_the_memory(artefacts: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", str(artefacts[".pt"]), "--memory", "--json"])
    table = json.loads(capsys.readouterr().out)
    assert table["memory"].keys() == {"anonymous_bytes", "resident_bytes", "loaded", "kernels"}
    main(["audit", str(artefacts[".pt"]), "--memory"])
    assert "private anonymous bytes" in capsys.readouterr().out
