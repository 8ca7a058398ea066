"""Files: each kernel once, equal bytes, equal outputs; whatever is no such file is refused by name."""

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings

from dacnn.checkpoint import load, replacing, save
from dacnn.errors import CheckpointError
from dacnn.networks.network import Network, create
from dacnn.networks.plan import Input
from dacnn.networks.zoo import DESIGNS
from reference import changed, images_for, one_thread, randomise  # noqa: F401  (one_thread is a fixture)

# header (names, shapes, offsets) and plan of a file
OVERHEAD_BYTES = 32 * 1024


def made(name: str = "dacnn18-mix-reg", **changes: Any) -> Network:
    changes = {"width": 8, "num_classes": 5, "seed": 0} | changes
    return randomise(create(name, **changes)).eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good file."""
    path = tmp_path / "network.safetensors"
    save(made(depths=(1, 1)), path)
    return path


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a file, read without dacnn."""
    with safetensors.safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(metadata["dacnn"])  # noqa: SIM118


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: Any) -> None:
    safetensors.torch.save_file(tensors, path, {"dacnn": json.dumps(metadata)})


def refused(path: Path) -> str:
    """The message with which a file is refused; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what is in a file


@pytest.mark.parametrize("name", sorted(DESIGNS))
def test_what_is_loaded_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    network = made(name)
    save(network, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert loaded.plan == network.plan and not loaded.training
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
        floats = images_for(network.plan, 2, dtype=torch.float32)
        assert torch.equal(loaded(floats), network(floats))
    assert set(loaded.state_dict()) == set(network.state_dict())
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_input_and_class_names_come_back(tmp_path: Path) -> None:
    input = Input(48, 40, 1, (0.3,), (0.7,), "pad")
    plan = create("dacnn3", width=4, in_channels=1).plan.for_data(input, ("Käse", "猫", "\ud800"))
    network = Network(plan)
    save(network, str(tmp_path / "a.safetensors"))
    loaded = load(str(tmp_path / "a.safetensors"))
    assert loaded.plan == plan
    assert torch.equal(loaded.normalize.scale, network.normalize.scale)
    assert torch.equal(loaded.normalize.shift, network.normalize.shift)


@pytest.mark.parametrize("name", ["dacnn14", "dacnn18", "dacnn34-reg", "dacnn18-mix", "resnet18"])
def test_a_file_holds_each_kernel_once_and_little_else(name: str, tmp_path: Path) -> None:
    network = create(name, width=32)
    path = tmp_path / "a.safetensors"
    save(network, path)
    with safetensors.safe_open(path, framework="pt") as opened:
        keys = list(opened.keys())
        kernels = [key for key in keys if len(opened.get_slice(key).get_shape()) == 4 and ".regulator." not in key]
    assert sorted(kernels) == sorted(f"anchors.{kernel}" for kernel in network.plan.kernels())
    assert sorted(keys) == sorted(network.state_dict())
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    assert path.stat().st_size <= 1.05 * tensors + OVERHEAD_BYTES


def test_the_same_network_writes_the_same_bytes(tmp_path: Path) -> None:
    network = made()
    for name in ("a", "b"):
        save(network, tmp_path / name)
    save(load(tmp_path / "a"), tmp_path / "c")
    save(network.to(memory_format=torch.channels_last), tmp_path / "d")  # type: ignore[call-overload]
    assert len({(tmp_path / name).read_bytes() for name in "abcd"}) == 1


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    code = "import sys, dacnn; dacnn.save(dacnn.create('dacnn18-mix', width=8, seed=3), sys.argv[1])"
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, env=environment)
    save(create("dacnn18-mix", width=8, seed=3), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_channels_last_network_is_saved_and_loads(tmp_path: Path) -> None:
    network = made().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save(network, tmp_path / "a")
    images = images_for(network.plan, 2, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a")(images), network(images))


def test_saving_changes_nothing_in_the_network(tmp_path: Path) -> None:
    network = made().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save(network, tmp_path / "a")
    assert network.training
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_compiled_network_is_saved_as_the_network_it_compiles(tmp_path: Path) -> None:
    network = made()
    save(torch.compile(network, backend="eager"), tmp_path / "a")  # type: ignore[arg-type]
    save(network, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_loaded_network_does_not_depend_on_its_file(file: Path) -> None:
    network = load(file)
    images = images_for(network.plan, 2, dtype=torch.float32)
    with torch.no_grad():
        before = network(images)
        size = file.stat().st_size
        file.write_bytes(b"\xff" * size)
        assert torch.equal(network(images), before)


def test_a_file_is_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        save(made(), tmp_path / "a")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


# ---------------------------------------------------------------- files that are none


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nowhere.safetensors")
    assert "no such file" in refused(tmp_path / "no" / "folder.safetensors")


@pytest.mark.parametrize("content", [b"", b"\0", b"hello", b"\xff" * 100, b"\0" * 1000, b"PK\x03\x04" + b"\0" * 50], ids=repr)
def test_garbage_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(content)
    assert "not a readable .safetensors file" in refused(path)


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "pickle.pt"
    torch.save({"a": torch.zeros(3)}, path)
    assert "not a readable .safetensors file" in refused(path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.2, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(share: float, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(file)


def test_a_file_that_goes_on_behind_its_end_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0\0\0\0")
    refused(file)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.floats(0, 1), value=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_harmless(where: float, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    save(made("dacnn3", width=2), path)
    content = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    content[int(where * (7 + header))] = value
    path.write_bytes(content)
    try:
        network = load(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(network, Network)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    assert "has no 'dacnn' metadata" in refused(path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    assert "has no 'dacnn' metadata" in refused(path)


NO_OBJECTS = ["", "{", "null", "[]", "1", '"x"', "[" * 100_000, '{"a":' * 100_000, "9" * 5_000]


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: repr(text[:6]))
def test_metadata_that_is_no_json_object_is_refused(text: str, file: Path) -> None:
    tensors, _ = parts(file)
    safetensors.torch.save_file(tensors, file, {"dacnn": text})
    assert "has no 'dacnn' metadata" in refused(file)


@pytest.mark.parametrize("version", [0, 2, None, "1", 1.5, []])
def test_another_format_is_refused(version: Any, file: Path) -> None:
    tensors, metadata = parts(file)
    write(file, tensors, metadata | {"format": version})
    assert "is of format" in refused(file)


def test_a_missing_format_is_refused(file: Path) -> None:
    tensors, metadata = parts(file)
    del metadata["format"]
    write(file, tensors, metadata)
    assert "is of format None" in refused(file)


LAYER = ("plan", "stages", 0, "blocks", 0, "layers", 1)
TAMPERED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "no plan": (("plan",), None),
    "plan is a list": (("plan",), []),
    "plan is text": (("plan",), "dacnn14"),
    "no stem": (("plan", "stem"), None),
    "fewer classes": (("plan", "classes"), ["a"]),
    "no classes": (("plan", "classes"), []),
    "unknown field": (("plan", "colour"), "red"),
    "other channels": (("plan", "stem", "out_channels"), 9),
    "channels beyond memory": (("plan", "stem", "out_channels"), 10**30),
    "kernel size beyond memory": (("plan", "stem", "kernel_size"), 10**30 + 1),
    "negative kernel size": (("plan", "stem", "kernel_size"), -3),
    "another kernel size": (("plan", "stem", "kernel_size"), 5),
    "kernel renamed": (("plan", "stem", "kernel"), "other"),
    "kernel with a dot": (("plan", "stem", "kernel"), "a.b"),
    "kernel without a name": (("plan", "stem", "kernel"), ""),
    "kernel named as a method": (("plan", "stem", "kernel"), "forward"),
    "unknown regulator": ((*LAYER, "regulator", "kind"), "magic"),
    "regulator of another kind": ((*LAYER, "regulator", "kind"), "depthwise"),
    "regulator that wants a rank": ((*LAYER, "regulator", "kind"), "low-rank"),
    "rank where none is taken": ((*LAYER, "regulator", "rank"), 3),
    "rank that is text": ((*LAYER, "regulator", "rank"), "x"),
    "place that does not exist": ((*LAYER, "regulator", "place"), "nowhere"),
    "regulator taken away": ((*LAYER, "regulator"), None),
    "no layers in a block": ((*LAYER[:-1],), []),
    "no stages": (("plan", "stages"), []),
    "mean that is text": (("plan", "input"), {"mean": ["a", "b", "c"]}),
    "standard deviation that is no number": (("plan", "input"), {"std": [float("nan")] * 3}),
    "fit that does not exist": (("plan", "input"), {"fit": "magic"}),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_plan_is_refused_by_the_name_of_its_file(case: str, file: Path) -> None:
    tensors, metadata = parts(file)
    path, value = TAMPERED[case]
    write(file, tensors, changed(metadata, path, value))
    refused(file)


def test_a_kernel_of_another_shape_is_refused_by_its_name(file: Path) -> None:
    tensors, metadata = parts(file)
    write(file, tensors | {"anchors.stem": torch.zeros(8, 3, 5, 5)}, metadata)
    message = refused(file)
    assert "tensor 'anchors.stem' has shape (8, 3, 5, 5)" in message and "(8, 3, 3, 3)" in message


def test_a_missing_and_an_extra_tensor_are_refused_by_name(file: Path) -> None:
    tensors, metadata = parts(file)
    write(file, {name: tensor for name, tensor in tensors.items() if name != "classifier.bias"}, metadata)
    assert "tensor 'classifier.bias' has shape none" in refused(file)
    write(file, tensors | {"more": torch.zeros(1)}, metadata)
    assert "tensor 'more'" in refused(file)


def test_kernels_that_are_no_floats_are_refused(file: Path) -> None:
    tensors, metadata = parts(file)
    write(file, tensors | {"anchors.stem": tensors["anchors.stem"].to(torch.int8)}, metadata)
    assert "anchors.stem" in refused(file)


# ---------------------------------------------------------------- writing that fails


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), OSError("odd"), KeyboardInterrupt()]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    failure: BaseException, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = file.read_bytes()

    def fail(descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        save(made("dacnn3"), file)
    if isinstance(failure, OSError):
        # the reason in words, also where the system gives no number
        assert str(file) in str(caught.value) and (failure.strerror or "odd") in str(caught.value)
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == old


def test_a_first_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        save(made("dacnn3"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_refused_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "a", tmp_path / "plain" / "a", tmp_path / "folder"):
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            save(made("dacnn3"), path)
        assert str(path) in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["folder", "plain"]


def test_a_folder_without_permission_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*arguments: object, **named: object) -> None:
        # root may write everywhere, so the refusal is played
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", forbid)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(made("dacnn3"), tmp_path / "a")


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path) as beside:
        beside.write_bytes(b"new")
        assert beside.parent == path.parent and path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_block_that_fails_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half-way"), replacing(path) as beside:
        beside.write_bytes(b"half")
        raise RuntimeError("half-way")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["a"]


# ---------------------------------------------------------------- run directories


def test_of_a_run_the_best_weights_are_taken_else_the_last(tmp_path: Path) -> None:
    last, best = (made("dacnn3", seed=seed) for seed in (1, 2))
    save(last, tmp_path / "last.safetensors")
    assert torch.equal(load(tmp_path).anchors["width8"], last.anchors["width8"])
    save(best, tmp_path / "best.safetensors")
    assert torch.equal(load(tmp_path).anchors["width8"], best.anchors["width8"])


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    assert "holds no best.safetensors and no last.safetensors" in refused(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert "expected a run" in refused(tmp_path)


def test_what_a_link_names_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    with replacing(tmp_path / "link") as beside:
        beside.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "new"


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="a device or a pipe: expected the name of a file"), replacing(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1
