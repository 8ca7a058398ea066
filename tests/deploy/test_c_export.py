"""`dacnn export --to c`: all files or none, checked, and what it refuses."""

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dacnn
import dacnn.deploy.c.files
import dacnn.deploy.export
from c_networks import STRICT, network_of, tool, with_rounded_kernels
from dacnn.deploy.c.source import to_c
from dacnn.deploy.lower import lower
from dacnn.deploy.parity import noise_images, reference_logits
from dacnn.deploy.program import Program
from dacnn.errors import CheckpointError, ConfigError, DeployError, UnknownNameError
from dacnn.networks.network import Network
from dacnn.networks.plan import Input
from interpreter import run
from reference import one_thread, randomise  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def network() -> Network:
    tool("gcc")
    return randomise(dacnn.create("dacnn7", width=8, num_classes=3, seed=0)).eval()


def test_an_export_computes_what_the_network_computes(network: Network, tmp_path: Path) -> None:
    done = dacnn.export(network, "c", tmp_path / "net.c", images=noise_images(network.input, 5))
    assert done.parity.images == 5 and done.parity.max_error < 1e-5 and done.parity.top1_agreement == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.c", "net.h", "net_example.c"]
    assert done.file_bytes == (tmp_path / "net.c").stat().st_size
    header = (tmp_path / "net.h").read_text()
    assert f"net_WORKSPACE_BYTES {done.workspace_bytes}\n" in header and f"net_CONTEXT_BYTES {done.context_bytes}\n" in header
    table = done.to_table()
    assert table["workspace_bytes"] == done.workspace_bytes and table["others"] == [str(path) for path in done.others]


def test_a_library_is_built_where_it_is_wanted(network: Network, tmp_path: Path) -> None:
    done = dacnn.export(network, "c", tmp_path / "net.c", build=True)
    assert tmp_path / "net.so" in done.others
    images = noise_images(network.input, 2)
    expected = reference_logits(network, images)
    assert np.abs(dacnn.runtime.load(tmp_path / "net.so")(images.numpy()) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("share", ["all", "template"])
def test_kernels_in_bfloat16_are_rounded_once_and_the_distance_is_told(share: str, tmp_path: Path) -> None:
    network = network_of("dacnn7", ("a", "b", "c"), width=16, share=share)
    images = noise_images(network.input, 5)
    done = dacnn.export(network, "c", tmp_path / "net.c", dtype="bfloat16", build=True, images=images)
    got, program = dacnn.runtime.load(tmp_path / "net.so")(images.numpy()), lower(network)
    rounded, whole = (run(one, images.numpy()) for one in (with_rounded_kernels(program), program))
    assert np.abs(got - rounded).max() < 1e-4 * np.abs(rounded).max()
    assert done.parity.max_error == pytest.approx(np.abs(got - whole).max() / np.abs(whole).max(), rel=1e-3)
    assert done.parity.max_error > 1e-4


@pytest.mark.parametrize("what", ["steps", "code"])
def test_rounding_excuses_no_other_difference(
    network: Network, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(program: Program) -> Program:
        tensors = {name: tensor * np.float32(1.01) if tensor.ndim > 1 else tensor for name, tensor in program.tensors.items()}
        return dataclasses.replace(program, tensors=tensors)

    if what == "steps":
        monkeypatch.setattr(dacnn.deploy.export, "lower", lambda network: other(lower(network)))
        says = "the program that was made of it does not compute what the network computes"
    else:
        monkeypatch.setattr(dacnn.deploy.c.files, "to_c", lambda program, **settings: to_c(other(program), **settings))
        says = "what was exported does not compute what the program with rounded kernels computes"
    with pytest.raises(DeployError, match=says):
        dacnn.export(network, "c", tmp_path / "net.c", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 3, 2])
def test_the_example_names_the_class_of_an_image(channels: int, tmp_path: Path) -> None:
    of = Input(12, 10, channels, (0.5,) * channels, (0.25,) * channels)
    network = network_of("dacnn3", ("left", "naïve one", "right"), of, width=8)
    dacnn.export(network, "c", tmp_path / "net.c")
    example = (tmp_path / "net_example.c").read_text()
    makefile = example[example.index("net_example: ") :].partition("*/")[0]
    (tmp_path / "Makefile").write_text(makefile)
    cc = f"CC={tool('gcc')} {' '.join(STRICT)} -fsanitize=address,undefined"
    done = subprocess.run([tool("make"), cc, "net_example"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    images = noise_images(of, 6)
    named = reference_logits(network, images).argmax(1)
    for image, expected in zip(images.numpy(), named, strict=True):
        head = {1: b"P5\n# made by hand\n10 12\n255\n", 3: b"P6 10 12 255\n"}.get(channels, b"")
        (tmp_path / "image").write_bytes(head + image.tobytes())
        done = subprocess.run(["./net_example", "image"], cwd=tmp_path, capture_output=True, check=True)
        assert done.stdout.decode() == network.classes[expected] + "\n"
    for wrong in (b"", b"P4 10 12 255\n", head + b"short", b"P6 9 12 255\n" + image.tobytes() + bytes(999)):
        (tmp_path / "image").write_bytes(wrong if channels != 2 else b"short")
        done = subprocess.run(["./net_example", "image"], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 2 and b"expected" in done.stderr
    assert subprocess.run(["./net_example"], cwd=tmp_path, capture_output=True, check=False).returncode == 2


def test_a_file_that_computes_something_else_is_not_written(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.h").write_text("what stood there")

    def broken(network: Network) -> Any:
        program = dacnn.deploy.lower.lower(network)
        return dataclasses.replace(program, tensors={name: tensor * 2 for name, tensor in program.tensors.items()})

    monkeypatch.setattr(dacnn.deploy.export, "lower", broken)
    with pytest.raises(DeployError, match=r"net\.c.*does not compute what the network computes"):
        dacnn.export(network, "c", tmp_path / "net.c", build=True)
    assert [path.name for path in tmp_path.iterdir()] == ["net.h"]
    assert (tmp_path / "net.h").read_text() == "what stood there"


def test_where_one_file_cannot_stand_none_is_replaced(network: Network, tmp_path: Path) -> None:
    (tmp_path / "net.h").mkdir()
    (tmp_path / "net_example.c").write_text("what stood there")
    with pytest.raises(CheckpointError, match=r"net\.h: cannot be written: it is a folder"):
        dacnn.export(network, "c", tmp_path / "net.c", build=True)
    assert {path.name for path in tmp_path.iterdir()} == {"net.h", "net_example.c"}
    assert (tmp_path / "net_example.c").read_text() == "what stood there"


def test_without_a_compiler_nothing_is_written(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeployError, match="no C compiler: looked for cc, gcc, clang"):
        dacnn.export(network, "c", tmp_path / "net.c")
    monkeypatch.setenv("CC", "nocc -m32")
    with pytest.raises(DeployError, match="looked for nocc -m32"):
        dacnn.export(network, "c", tmp_path / "net.c")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_refuses_is_quoted(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -include nowhere.h")
    with pytest.raises(DeployError, match=r"'gcc' does not compile.*nowhere\.h"):
        dacnn.export(network, "c", tmp_path / "net.c", build=True)
    assert list(tmp_path.iterdir()) == []


def test_the_compiler_is_the_one_that_is_named(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", tool("clang"))
    assert dacnn.export(network, "c", tmp_path / "net.c").parity.max_error < 1e-5


def test_what_cannot_be_is_refused(network: Network, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown winograd 'on'"):
        dacnn.export(network, "c", tmp_path / "net.c", winograd="on")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="winograd is 'off', which 'onnx' does not take"):
        dacnn.export(network, "onnx", tmp_path / "net.c", winograd="off")
    with pytest.raises(ConfigError, match="dtype is 'bfloat16', which 'onnx-loop' does not take"):
        dacnn.export(network, "onnx-loop", tmp_path / "net.onnx", dtype="bfloat16")
    with pytest.raises(UnknownNameError, match="unknown dtype 'float16'"):
        dacnn.export(network, "c", tmp_path / "net.c", dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="build is 'True', which 'pt2' does not take"):
        dacnn.export(network, "pt2", tmp_path / "net.c", build=True)
    with pytest.raises(UnknownNameError, match="unknown microcontroller 'cortex-m5'"):
        dacnn.export(network, "c", tmp_path / "net.c", target="cortex-m5")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ram_budget is given, but not of what"):
        dacnn.export(network, "c", tmp_path / "net.c", winograd="init", ram_budget=1000)
    with pytest.raises(ConfigError, match="flash_budget is '0', which 'onnx' does not take"):
        dacnn.export(network, "onnx", tmp_path / "net.c", flash_budget=0)
    with pytest.raises(ConfigError, match="the C code takes uint8 images"):
        dacnn.export(network, "c", tmp_path / "net.c", float_input=True)
    with pytest.raises(DeployError, match=r"net\.cpp: a source of C is called NAME\.c: call it net\.c"):
        dacnn.export(network, "c", tmp_path / "net.cpp")
    with pytest.raises(DeployError, match=r"'1' is no name in C.*call the file net_1\.c"):
        dacnn.export(network, "c", tmp_path / "1.c")
    with pytest.raises(CheckpointError, match="cannot be written"):
        dacnn.export(network, "c", tmp_path / "nowhere" / "net.c")
    assert os.listdir(tmp_path) == []
