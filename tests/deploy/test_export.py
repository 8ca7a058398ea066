"""What `dacnn.export` promises of every file: size, one kernel, parity, and nothing half-written."""

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import dacnn
import dacnn.deploy.export
from dacnn.deploy.parity import Parity, check, compare, noise_images, reference_logits
from dacnn.errors import CheckpointError, ConfigError, DeployError, UnknownNameError
from dacnn.networks.network import Network
from factories import chain
from reference import randomise

TARGETS: dict[str, dict[str, Any]] = {
    "onnx": {"to": "onnx"},
    "onnx-loop, small": {"to": "onnx-loop"},
    "onnx-loop, fast": {"to": "onnx-loop", "form": "fast"},
    "pt2": {"to": "pt2"},
}


@pytest.fixture(scope="module")
def network() -> Network:
    return randomise(dacnn.create("dacnn7", width=16, seed=0)).eval()


@pytest.mark.parametrize("float_input", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_an_export_computes_what_the_network_computes(target: str, float_input: bool, network: Network, tmp_path: Path) -> None:
    images = noise_images(network.input, 5)
    done = dacnn.export(network, out=tmp_path / "file", float_input=float_input, images=images, **TARGETS[target])
    assert done.parity.images == 5 and done.parity.max_error < 1e-5 and done.parity.top1_agreement == 1
    assert done.file_bytes == (tmp_path / "file").stat().st_size


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_is_hardly_larger_than_what_it_holds(target: str, tmp_path: Path) -> None:
    network = dacnn.create("dacnn14", width=32)
    done = dacnn.export(network, out=tmp_path / "file", **TARGETS[target])
    layers = len(list(network.plan.layers()))
    allowance = 64 * 1024 + 8 * 1024 * layers if target == "pt2" else 32 * 1024
    assert done.file_bytes <= 1.05 * done.stored_bytes + allowance
    assert done.stored_bytes == dacnn.count(network).stored_bytes


@pytest.mark.parametrize("target", TARGETS)
def test_the_audit_finds_no_copy_in_an_export(target: str, network: Network, tmp_path: Path) -> None:
    path = tmp_path / ("file.pt2" if target == "pt2" else "file.onnx")
    dacnn.export(network, out=path, **TARGETS[target])
    assert dacnn.audit(path).single


def test_an_exported_program_is_loaded_without_this_library(network: Network, tmp_path: Path) -> None:
    dacnn.export(network, "pt2", tmp_path / "net.pt2")
    images = noise_images(network.input, 3)
    np.save(tmp_path / "images.npy", images.numpy())
    script = (
        "import sys, numpy, torch\n"
        "sys.modules['dacnn'] = None\n"
        "module = torch.export.load('net.pt2').module()\n"
        "numpy.save('logits.npy', module(torch.from_numpy(numpy.load('images.npy'))).detach().numpy())"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    parity = compare(np.load(tmp_path / "logits.npy").astype(np.float64), reference_logits(network, images))
    assert parity.max_error < 1e-5


def test_an_export_leaves_the_network_as_it_was(network: Network, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    for settings in TARGETS.values():
        dacnn.export(network, out=tmp_path / "file", **settings)
    assert network.training
    network.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_converted_network_is_exported(tmp_path: Path) -> None:
    shared, _ = dacnn.anchor(chain(10, 1))
    from dacnn.networks.adapted import Adapted
    from dacnn.networks.plan import Input

    network = Adapted(shared, Input(channels=1, mean=(0.5,), std=(0.25,)), tuple("0123456789")).eval()
    for settings in TARGETS.values():
        assert dacnn.export(network, out=tmp_path / "file", **settings).parity.max_error < 1e-5


def test_a_file_that_computes_something_else_is_not_written(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.onnx").write_bytes(b"what stood there")

    def broken(network: Network) -> Any:
        program = dacnn.deploy.lower.lower(network)
        tensors = dict(program.tensors)
        tensors["anchors.width16"] = tensors["anchors.width16"] * np.float32(1.01)
        return dataclasses.replace(program, tensors=tensors)

    monkeypatch.setattr(dacnn.deploy.export, "lower", broken)
    with pytest.raises(DeployError, match=r"net\.onnx.*does not compute what the network computes"):
        dacnn.export(network, "onnx", tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_bytes() == b"what stood there"


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_leaves_nothing_behind(
    target: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="file: cannot be written: No space left on device"):
        dacnn.export(network, out=tmp_path / "file", **TARGETS[target])
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_is_missing_is_named(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeployError, match=r"ONNX Runtime, which is missing: pip install 'dacnn\[export\]'"):
        dacnn.export(network, "onnx", tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_targets_and_forms_that_do_not_exist_are_refused(network: Network, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown target 'onx': did you mean 'onnx'"):
        dacnn.export(network, "onx", tmp_path / "file")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown form 'quick'"):
        dacnn.export(network, "onnx-loop", tmp_path / "file", form="quick")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="form is 'fast', but 'pt2' has no forms"):
        dacnn.export(network, "pt2", tmp_path / "file", form="fast")
    with pytest.raises(CheckpointError, match="cannot be written"):
        dacnn.export(network, "onnx", tmp_path / "nowhere" / "file")


def test_the_file_tells_what_goes_in_and_comes_out(network: Network, tmp_path: Path) -> None:
    dacnn.export(network, "onnx", tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    (entry,) = model.metadata_props
    told = json.loads(entry.value)
    assert entry.key == "dacnn" and tuple(told["classes"]) == network.classes
    assert told["input"] == {**dataclasses.asdict(network.input), "mean": [0.5] * 3, "std": [0.25] * 3}
    dacnn.export(network, "pt2", tmp_path / "net.pt2")
    extra = {"dacnn.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra["dacnn.json"]) == {name: value for name, value in told.items() if name != "name"}


def test_an_error_is_measured_against_the_largest_logit() -> None:
    reference = np.array([[1.0, -4.0], [2.0, 1.0]])
    parity = compare(reference + np.array([[0.0, 0.02], [0.0, 0.0]]), reference)
    assert parity == Parity(2, pytest.approx(0.005), 1.0, 0)


def test_another_first_guess_is_explained_only_by_a_margin_below_twice_the_error() -> None:
    reference = np.array([[1.0, 0.9], [5.0, 0.0]])
    close, far = np.array([[0.95, 0.96], [5.0, 0.0]]), np.array([[1.0, 0.9], [2.0, 2.1]])
    assert compare(close, reference).unexplained == 0 and compare(close, reference).top1_agreement == 0.5
    # here the margin, 5, is below twice the error of 3
    assert compare(far, reference).unexplained == 0
    assert compare(far[:, ::-1], reference).unexplained == 0
    with pytest.raises(DeployError):
        check(compare(far, reference), "far")


@pytest.mark.parametrize("broken", [np.full((2, 2), np.nan), np.zeros((2, 3))])
def test_logits_that_are_no_numbers_or_of_another_shape_are_an_error(broken: np.ndarray) -> None:
    with pytest.raises(DeployError, match="does not compute"):
        check(compare(broken, np.ones((2, 2))), "it")


def test_a_network_stays_as_it_is(tmp_path: Path) -> None:
    network = dacnn.create("dacnn3", width=8).double()
    dacnn.export(network, "onnx", tmp_path / "net.onnx", float_input=True)
    assert {tensor.dtype for tensor in network.normalize.buffers()} == {torch.float64}


def test_no_images_to_compare_on_are_refused(network: Network, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="images has none in it"):
        dacnn.export(network, "onnx", tmp_path / "net.onnx", images=torch.zeros(0, 32, 32, 3, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []
