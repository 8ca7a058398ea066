"""A WebAssembly module computes what the network computes, holds each kernel once, and runs where JavaScript does."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dacnn
from c_networks import network_of, tool, with_rounded_kernels
from dacnn.deploy.c.wasm import Module
from dacnn.deploy.lower import lower
from dacnn.errors import ConfigError, DeployError
from interpreter import run

pytest.importorskip("wasmtime")
CLASSES = tuple("abcde")


@pytest.fixture(autouse=True)
def compilers() -> None:
    tool("clang")
    tool("wasm-ld")


def images_of(network: Any, count: int) -> torch.Tensor:
    of = network.input
    size = (count, of.height, of.width, of.channels)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def imports_of(module: bytes) -> int:
    """How many imports a module has: the section of that number, by the format's definition."""
    assert module[:8] == b"\0asm" + struct.pack("<I", 1)
    at = 8
    while at < len(module):
        kind, size, shift, at = module[at], 0, 0, at + 1
        while True:
            size |= (module[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if module[at - 1] < 128:
                break
        if kind == 2:
            return module[at]
        at += size
    return 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dacnn14", {}),
        ("dacnn18", {"share": "stage"}),
        ("dacnn9", {"share": "template"}),
        ("dacnn9", {"share": "repeat"}),
        ("dacnn5", {"regulator": "depthwise"}),
    ],
    ids=str,
)
def test_every_scheme_gives_what_the_network_gives(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    network = network_of(name, CLASSES, width=8, **settings)
    images = images_of(network, 3)
    done = dacnn.export(network, "wasm", tmp_path / "net.wasm", images=images)
    with torch.no_grad():
        expected = network.double()(images).numpy()
    got = Module(done.path, len(CLASSES))(images.numpy())
    # float32, and Winograd's convolution, against float64
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()
    assert done.others == (tmp_path / "net.mjs",) and done.file_bytes == done.path.stat().st_size


def test_each_kernel_is_there_once_and_nothing_else_is_needed(tmp_path: Path) -> None:
    network = network_of("dacnn14", CLASSES, width=16)
    done = dacnn.export(network, "wasm", tmp_path / "net.wasm")
    content = done.path.read_bytes()
    stored = network.state_dict()["anchors.width16"]
    # by blocks of outputs, of one tap: O, I, H, W becomes tap, I, O
    kernel = stored.permute(2, 3, 1, 0).contiguous().numpy().tobytes()
    assert content.count(kernel) == 1 and content.count(kernel[:1024]) == 1
    assert imports_of(content) == 0
    # code, and the kernel: no copy of it, transformed or not
    assert len(content) < done.stored_bytes + 48 * 2**10
    assert done.path.stat().st_mode & 0o111 == 0


@pytest.mark.parametrize("settings", [{}, {"share": "repeat"}], ids=str)
def test_kernels_in_bfloat16_take_half_the_download(settings: dict[str, Any], tmp_path: Path) -> None:
    network = network_of("dacnn14", CLASSES, width=32, **settings)
    images = images_of(network, 3)
    done = dacnn.export(network, "wasm", tmp_path / "net.wasm", dtype="bfloat16", images=images)
    assert done.file_bytes < done.stored_bytes / 2 + 48 * 2**10
    assert imports_of(done.path.read_bytes()) == 0
    expected = run(with_rounded_kernels(lower(network)), images.numpy())
    got = Module(done.path, len(CLASSES))(images.numpy())
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()


# whole blocks of sixteen channels, and one of four
@pytest.mark.parametrize("width", [32, 20])
def test_integers_are_the_same_bits_in_fewer_bytes(width: int, tmp_path: Path) -> None:
    network = network_of("dacnn14", CLASSES, width=width)
    # not written unless its logits are, bit for bit, those of the integers
    done = dacnn.export(network, "wasm", tmp_path / "net.wasm", dtype="int8", calibration=images_of(network, 16))
    assert done.file_bytes < done.stored_bytes + 16 * 2**10
    assert imports_of(done.path.read_bytes()) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_javascript_names_the_class_that_the_network_names(channels: int, tmp_path: Path) -> None:
    network = network_of(
        "dacnn3", ('quote"d', "ünï", *CLASSES[2:]), dacnn.Input(32, 40, channels, (0.4,) * channels, (0.2,) * channels)
    )
    network.eval()
    # a name that is none in C, and has to be spelled in a URL
    dacnn.export(network, "wasm", tmp_path / 'my "net" #1.wasm')
    images = images_of(network, 2)
    rgba = np.full((32, 40, 4), 255, np.uint8)
    rgba[..., :3] = images[0].numpy()
    script = """
import { load, classes, height, width, channels } from "./my%20%22net%22%20%231.mjs";
import { readFileSync } from "node:fs";
const given = JSON.parse(readFileSync("given.json"));
const network = await load(), other = await load(readFileSync('my "net" #1.wasm'));
const said = [];
for (const image of [new Uint8Array(3), { data: new Uint8ClampedArray(4), width: 1, height: 1 }])
  try { network.logits(image); } catch (error) { said.push(`${error.name}: ${error.message}`); }
other.logits(Uint8Array.from(given.second));
console.log(JSON.stringify({
  classes, size: [height, width, channels], said,
  logits: [...network.logits(Uint8Array.from(given.first))],
  drawn: [...network.logits({ data: Uint8ClampedArray.from(given.rgba), width: 40, height: 32 })],
  found: network.classify(Uint8Array.from(given.first), 2),
}));
"""
    (tmp_path / "test.mjs").write_text(script)
    given = {"first": images[0].flatten().tolist(), "second": images[1].flatten().tolist(), "rgba": rgba.flatten().tolist()}
    (tmp_path / "given.json").write_text(json.dumps(given))
    done = subprocess.run([tool("node"), "test.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    with torch.no_grad():
        expected = network(images[:1])[0]
    np.testing.assert_allclose(told["logits"], expected.numpy(), rtol=0, atol=1e-4 * float(expected.abs().max()))
    # of one channel the three are equal, and so is their grey
    assert told["drawn"] == told["logits"]
    likely = expected.softmax(0).topk(2)
    assert [one["name"] for one in told["found"]] == [network.classes[k] for k in likely.indices]
    np.testing.assert_allclose([one["probability"] for one in told["found"]], likely.values, atol=1e-3)
    assert told["classes"] == list(network.classes) and told["size"] == [32, 40, channels]
    assert told["said"] == [
        f"RangeError: image has 3 bytes: expected 32 x 40 x {channels}",
        "RangeError: image is 1 x 1: expected 40 x 32: draw it to that size first",
    ]


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"out": "net.c"}, DeployError, "a WebAssembly module is called NAME.wasm: call it net.wasm"),
        ({"build": True}, ConfigError, "build is 'True', which 'wasm' does not take"),
        ({"float_input": True}, ConfigError, "input is 'float'"),
        ({"winograd": "off", "target": "cortex-m4"}, ConfigError, "target is 'cortex-m4', which 'wasm' does not take"),
    ],
    ids=range(4),
)
def test_what_a_module_does_not_have_is_refused(settings: dict[str, Any], kind: type, says: str, tmp_path: Path) -> None:
    out = tmp_path / settings.pop("out", "net.wasm")
    with pytest.raises(kind, match=says):
        dacnn.export(dacnn.create("dacnn3", width=8), "wasm", out, **settings)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = dacnn.create("dacnn3", width=8)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wasmtime", None)
        with pytest.raises(DeployError, match=r"wasmtime, which is missing: pip install 'dacnn\[export\]'"):
            dacnn.export(network, "wasm", tmp_path / "net.wasm")
    monkeypatch.setenv("WASI_SDK_PATH", str(tmp_path / "sdk"))
    with pytest.raises(DeployError, match="clang' is missing: .*apt-get install clang lld wasi-libc"):
        dacnn.export(network, "wasm", tmp_path / "net.wasm")
    assert not list(tmp_path.iterdir())


def test_without_winograd_a_module_takes_less_memory(tmp_path: Path) -> None:
    network = network_of("dacnn14", CLASSES, width=32)
    sizes = {}
    for winograd in ("init", "off"):
        done = dacnn.export(network, "wasm", tmp_path / f"{winograd}.wasm", winograd=winograd)
        sizes[winograd] = Module(done.path, len(CLASSES)).memory_bytes
    assert sizes["off"] < sizes["init"]
