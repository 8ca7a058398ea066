"""The copies of a kernel in a process are counted in its memory itself, whatever runtime made them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dacnn
from dacnn.cli import main
from dacnn.deploy.c.build import build
from dacnn.deploy.c.source import to_c
from dacnn.deploy.lower import lower
from dacnn.errors import ArtefactError
from dacnn.measure.process import held_by
from dacnn.measure.runtimes import artefact_copies
from dacnn.measure.stored import StoredArray
from reference import randomise

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/PID/mem")

# layers of dacnn14 that read its shared kernel
READERS = 12

# holds a kernel four times, in three forms, and once had a fifth; nothing of another
HOLDS = """
import sys
import numpy as np
kernel = np.load(sys.argv[1])
half = (kernel.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
scaled = np.ascontiguousarray((kernel * np.linspace(1, 2, 32, dtype=np.float32)[:, None, None, None]).transpose(2, 3, 1, 0))
held = [kernel, kernel.copy(), half, scaled]
print("ready", flush=True)
sys.stdin.read()
"""


def test_every_copy_in_a_process_is_counted_in_its_form(tmp_path: Path) -> None:
    kernels = []
    for seed, name in enumerate(("held", "absent")):
        values = np.random.default_rng(seed).standard_normal((32, 16, 3, 3)).astype(np.float32)
        kernels.append(StoredArray((name,), "parameter", values, "float32", values.nbytes))
    np.save(tmp_path / "kernel.npy", kernels[0].values)
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "kernel.npy")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        held, absent = held_by(process.pid, kernels)
        process.kill()
    size = 32 * 16 * 9
    assert (absent.count, absent.nbytes, absent.differences) == (0, 0, ())
    assert (held.count, held.nbytes) == (4, 3 * 4 * size + 2 * size)
    assert set(held.differences) == {("exact",), ("rounded to bfloat16",), ("scaled per output channel", "HWIO")}


def test_a_process_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ArtefactError, match="cannot be searched"):
        held_by(2**22 + 1, [])


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefacts")
    shared = randomise(dacnn.create("dacnn14", width=16, num_classes=5, seed=0)).eval()
    dacnn.save(shared, folder / "net.safetensors")
    dacnn.export(shared, "onnx", folder / "plain.onnx")
    dacnn.export(shared, "onnx-loop", folder / "loop.onnx")
    build(to_c(lower(shared), name="net"), folder / "net.so")
    return folder


@pytest.mark.parametrize(("name", "count"), [("net.so", 1), ("loop.onnx", 1), ("plain.onnx", READERS)])
def test_a_runtime_holds_the_kernel_once_or_once_a_layer(name: str, count: int, artefacts: Path) -> None:
    held = {kernel.name: kernel for kernel in artefact_copies(artefacts / name, artefacts / "net.safetensors")}
    assert held["anchors.width16"].count == count
    if count > 1:
        assert all("scaled per output channel" in words for words in held["anchors.width16"].differences)


def test_pytorch_holds_it_and_may_reorder_it_for_a_convolution(artefacts: Path) -> None:
    held = {kernel.name: kernel for kernel in artefact_copies(artefacts / "net.safetensors")}
    assert ("exact",) in held["anchors.width16"].differences


def test_the_command_tells_it(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["audit", str(artefacts / "net.so"), "--against", str(artefacts / "net.safetensors"), "--memory"]
    main([*words, "--json"])
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert {kernel["name"]: kernel["count"] for kernel in memory["kernels"]}["anchors.width16"] == 1
    assert "compiled C" in memory["loaded"]
    main(words)
    assert "in memory: anchors.width16 once" in " ".join(capsys.readouterr().out.split())


def test_what_nothing_here_loads_is_refused(artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.elf").write_bytes((artefacts / "net.so").read_bytes())
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(tmp_path / "net.elf"), "--against", str(artefacts / "net.safetensors"), "--memory"])
    assert ended.value.code == 2
    assert "nothing here loads it" in capsys.readouterr().err
