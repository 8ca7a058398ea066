"""Kernels are found among any bytes: in every order, type, scale and place, by every back end of ours, and nowhere else."""

import io
import json
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import dacnn
from c_networks import integers_of, tool
from dacnn.cli import main
from dacnn.deploy.c.build import build, write
from dacnn.deploy.c.integer_source import to_c_int8
from dacnn.deploy.c.source import to_c
from dacnn.deploy.c.wasm import build_wasm
from dacnn.deploy.lower import lower
from dacnn.errors import ArtefactError
from dacnn.measure import search as searching
from dacnn.measure.audit import Audit, audit
from dacnn.measure.orders import orders_of
from dacnn.measure.search import Found, KernelSearch
from dacnn.measure.stored import StoredArray
from dacnn.networks.network import Network, create
from reference import one_thread, randomise  # noqa: F401  (one_thread is a fixture)

SHAPES = [(32, 32, 3, 3), (20, 6, 3, 3), (24, 1, 3, 3), (10, 48), (40, 64, 1, 1), (3, 16, 16, 3, 3)]


def kernel_of(shape: tuple[int, ...], seed: int = 0) -> StoredArray:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return StoredArray((f"kernel{seed}",), "parameter", values, "float32", values.nbytes)


def search(data: NDArray[np.uint8], kernels: Sequence[StoredArray], aligned: bool = False) -> list[Found]:
    return KernelSearch(kernels).find(data, aligned)


def noise(count: int, seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def laid(kernel: NDArray[np.float32], indices: NDArray[np.int32], dtype: str) -> NDArray[np.uint8]:
    """Bytes of a kernel in an order, rounded to a type."""
    padded = np.where(indices >= 0, kernel.ravel()[indices], np.float32(0))
    tensor = torch.from_numpy(padded)
    if dtype in {"int8", "uint8"}:
        rounded = np.round(padded / np.abs(padded).max() * 127).astype(np.int64)
        return (rounded + 128).astype(np.uint8) if dtype == "uint8" else rounded.astype(np.int8).view(np.uint8)
    return tensor.to(getattr(torch, dtype)).view(torch.uint8).numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_order_holds_every_number_once_and_none_is_there_twice(shape: tuple[int, ...]) -> None:
    orders = list(orders_of(shape))
    for order in orders:
        numbers = order.indices[order.indices >= 0]
        assert np.array_equal(np.sort(numbers), np.arange(np.prod(shape)))
    assert len({order.indices.tobytes() for order in orders}) == len(orders)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_kernel_is_found_in_every_order_and_type_at_any_byte(shape: tuple[int, ...], dtype: str) -> None:
    kernel = kernel_of(shape)
    parts, expected, length = [], [], 0
    for turn, order in enumerate(orders_of(shape)):
        gap, held = noise(101 + turn, seed=turn), laid(kernel.values, order.indices, dtype)
        start = length + len(gap)
        length = start + len(held)
        parts += [gap, held]
        expected.append((start, length, dtype, order.words))
    found = search(np.concatenate([*parts, noise(500)]), [kernel])
    assert [(copy.start, copy.end, copy.array.dtype, copy.difference.layout) for copy in found] == expected


@pytest.mark.parametrize("turned", [False, True])
def test_scaled_channels_are_found_also_where_a_scale_is_negative(turned: bool) -> None:
    kernel = kernel_of((32, 32, 3, 3))
    scales = np.random.default_rng(3).uniform(0.3, 3, (32, 1, 1, 1)).astype(np.float32)
    if turned:
        scales[::5] *= -1
    data = np.concatenate([noise(77), (kernel.values * scales).view(np.uint8).ravel(), noise(99)])
    (found,) = search(data, [kernel])
    assert found.start == 77
    assert found.difference.words == ("scaled per output channel",)


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (64, 64, 1, 1)], ids=str)
def test_where_outputs_lie_beside_each_other_a_few_negative_scales_hide_little(shape: tuple[int, ...]) -> None:
    """Blocks of 8, as ONNX Runtime has them, one channel in sixteen scaled by a negative factor."""
    order = next(order for order in orders_of(shape) if order.outputs == 8 and order.dimensions in {"OISio", "OSIo"})
    found = 0
    for seed in range(20):
        kernel, draw = kernel_of(shape, seed), np.random.default_rng(100 + seed)
        scales = draw.uniform(0.3, 3, (shape[0], 1, 1, 1)).astype(np.float32)
        scales[draw.choice(shape[0], shape[0] // 16, replace=False)] *= -1
        scaled = StoredArray(("scaled",), "", kernel.values * scales, "float32", 0)
        found += len(search(np.concatenate([noise(96), laid(scaled.values, order.indices, "float32")]), [kernel]))
    assert found >= 18


def test_pruned_kernels_are_found() -> None:
    kernel = kernel_of((32, 32, 3, 3))
    kernel.values[np.abs(kernel.values) < np.median(np.abs(kernel.values))] = 0
    for order in orders_of(kernel.values.shape):
        data = np.concatenate([noise(33), laid(kernel.values, order.indices, "float32"), noise(9)])
        assert [copy.start for copy in search(data, [kernel])] == [33], order


def test_kernels_that_cannot_be_told_are_not_looked_for(tmp_path: Path) -> None:
    positive = np.abs(kernel_of((16, 16, 3, 3)).values)
    kernels = [StoredArray(("a",), "", values, "float32", 0) for values in (positive, np.ones((8, 8, 3, 3), np.float32))]
    assert KernelSearch(kernels).looked_for == frozenset()
    kept = nn.ModuleDict({"told": nn.Conv2d(16, 16, 3, bias=False), "positive": nn.Conv2d(16, 16, 3, bias=False)})
    kept["positive"].weight.data.abs_()
    (tmp_path / "both.bin").write_bytes(b"\0" + b"".join(part.weight.detach().numpy().tobytes() for part in kept.values()))
    found = audit(tmp_path / "both.bin", against=kept)
    assert (counts(found), found.unsearched, found.missing) == ({"told.weight": 1}, ("positive.weight",), ())
    with pytest.raises(ArtefactError, match="no kernel of the reference can be told"):
        audit(tmp_path / "both.bin", against=kept["positive"])
    module = nn.ModuleDict({"a": nn.Conv2d(16, 16, 3, bias=False), "b": nn.Conv2d(16, 16, 3, bias=False)})
    module["b"].weight.data.copy_(module["a"].weight.data)
    (tmp_path / "model.bin").write_bytes(b"\0" * 7 + module["a"].weight.detach().numpy().tobytes())
    # a reference's own copies are one kernel
    assert counts(audit(tmp_path / "model.bin", against=module)) == {"a.weight": 1}


@pytest.mark.parametrize("start", [b"\x80\x99", b"12345678{", b"TFL3"])
def test_files_that_begin_like_others_or_end_in_a_zip_are_bytes(start: bytes, tmp_path: Path) -> None:
    kernel = nn.Conv2d(16, 16, 3, bias=False)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("labels.txt", "cat")
    content = start + b"\0\xff" * 8 + kernel.weight.detach().numpy().tobytes() + packed.getvalue()
    (tmp_path / "model.tflite").write_bytes(content)
    assert counts(audit(tmp_path / "model.tflite", against=kernel)) == {"weight": 1}


def test_kernels_are_found_across_the_borders_of_what_is_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [kernel_of((16, 16, 3, 3), seed) for seed in range(3)]
    parts = [part for kernel in kernels for part in (noise(13), kernel.values.view(np.uint8).ravel())]
    data = np.concatenate(parts)
    whole = [(copy.kernel, copy.start) for copy in search(data, kernels)]
    assert [kernel for kernel, _ in whole] == [0, 1, 2]
    for size in (256, 1 << 10, 1 << 12):
        monkeypatch.setattr(searching, "_CHUNK", size)
        assert [(copy.kernel, copy.start) for copy in search(data, kernels)] == whole


def test_where_numbers_are_aligned_what_lies_elsewhere_is_not_looked_for() -> None:
    kernel = kernel_of((16, 16, 3, 3))
    held = kernel.values.view(np.uint8).ravel()
    data = np.concatenate([noise(64), held, noise(66), held, noise(80)])
    assert [copy.start for copy in search(data, [kernel], aligned=True)] == [64]
    assert [copy.start for copy in search(data, [kernel])] == [64, 64 + len(held) + 66]


def test_nothing_is_found_in_noise_zeros_and_other_kernels() -> None:
    kernels = [kernel_of(shape, seed) for seed, shape in enumerate(SHAPES)]
    other = kernel_of((32, 32, 3, 3), seed=9).values.view(np.uint8).ravel()
    for data in (noise(1 << 18), np.zeros(1 << 18, np.uint8), other, noise(3), noise(0)):
        assert search(data, kernels) == []
    almost = kernels[0].values.copy()
    almost[7, 7] += 0.01
    assert search(almost.view(np.uint8).ravel(), kernels) == []


def network(**changes: Any) -> Network:
    return randomise(create("dacnn14", width=16, num_classes=5, seed=0, **changes)).eval()


def counts(found: Audit) -> dict[str, int]:
    return {kernel.name: len(kernel.copies) for kernel in found.kernels}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        *(({}, what) for what in ("float32", "bfloat16", "int8", "wasm")),
        *(({"share": "template", "templates": 2}, what) for what in ("float32", "int8")),
        ({"share": "repeat", "base_width": 4}, "bfloat16"),
    ],
    ids=str,
)
def test_what_is_compiled_of_our_c_holds_each_kernel_once(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    shared = network(**changes)
    program, path = lower(shared), tmp_path / "net.bin"
    if what == "int8":
        build(to_c_int8(integers_of(program), name="net"), path)
    elif what == "wasm":
        tool("wasm-ld")
        build_wasm(to_c(program, name="net"), path)
    else:
        build(to_c(program, name="net", dtype="float32" if what == "float32" else "bfloat16"), path)
    found = audit(path, against=shared)
    assert found.single, found.to_table()
    assert found.format == "bytes"
    twice = tmp_path / "twice.bin"
    twice.write_bytes(b"odd" + path.read_bytes() + path.read_bytes())
    assert set(counts(audit(twice, against=shared)).values()) == {2}


def test_an_object_for_a_board_holds_each_kernel_once(tmp_path: Path) -> None:
    shared = network()
    source = write(to_c(lower(shared), name="net", dtype="bfloat16"), tmp_path)
    command = [tool("arm-none-eabi-gcc"), "-mcpu=cortex-m4", "-mthumb", "-std=c99", "-O2", "-c", source.name, "-o", "net.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = audit(tmp_path / "net.o", against=shared)
    assert found.single
    assert {copy.dtype for kernel in found.kernels for copy in kernel.copies} == {"bfloat16"}


def test_groups_depthwise_kernels_and_features_of_an_image_are_found_in_our_c(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 24, 3),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, groups=24),
        nn.ReLU(),
        nn.Conv2d(24, 16, 3, groups=4),
        nn.ReLU(),
    ]
    module = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 5 * 5, 7))
    foreign = dacnn.adapt(module, dacnn.Input(16, 16), [str(index) for index in range(7)]).eval()
    build(to_c(lower(foreign), name="net"), tmp_path / "net.so")
    found = audit(tmp_path / "net.so", against=foreign)
    assert found.single, found.to_table()
    assert len(found.kernels) == 4


def test_what_onnx_runtime_keeps_is_found_without_reading_its_format(tmp_path: Path) -> None:
    shared = network()
    plain, optimised, unknown = (tmp_path / name for name in ("plain.onnx", "optimised.onnx", "model.bin"))
    dacnn.export(shared, "onnx", plain)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 4
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    unknown.write_bytes(optimised.read_bytes())
    as_bytes, as_onnx = audit(unknown, against=shared), audit(optimised, against=shared)
    assert counts(as_bytes) == counts(as_onnx)
    assert max(counts(as_bytes).values()) == 12
    assert not as_bytes.single


def exit_status(*words: object) -> int:
    """Of `dacnn`; 0 where it returns."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_tells_copies_and_what_was_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = network()
    dacnn.save(shared, tmp_path / "net.safetensors")
    build(to_c(lower(shared), name="net"), tmp_path / "net.so")
    against = ("--against", tmp_path / "net.safetensors")
    assert exit_status("audit", tmp_path / "net.so", *against) == 0
    printed = capsys.readouterr().out
    assert "(bytes)" in printed
    assert "Every kernel is stored once" in printed
    (tmp_path / "noise.bin").write_bytes(noise(1 << 16).tobytes())
    assert exit_status("audit", tmp_path / "noise.bin", *against, "--json") == 1
    table = json.loads(capsys.readouterr().out)
    assert table["missing"] == ["anchors.stem", "anchors.width16", "classifier.weight"]
    assert exit_status("audit", tmp_path / "noise.bin", *against) == 1
    assert "not found among the bytes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"float kernel[] = {1.0f};\n" * 9, "is text"), (b"\x1f\x8b\x08" + bytes(99), "compressed by gzip"), (b"", "is empty")],
)
def test_what_hides_its_numbers_is_refused(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dacnn.save(network(), tmp_path / "net.safetensors")
    (tmp_path / "model.bin").write_bytes(content)
    assert exit_status("audit", tmp_path / "model.bin", "--against", tmp_path / "net.safetensors") == 2
    assert said in capsys.readouterr().err
