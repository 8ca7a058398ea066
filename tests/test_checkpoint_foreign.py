"""Files of foreign networks: each kernel once, equal bytes, equal outputs, and a module to load them into."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dacnn
from dacnn.checkpoint import load, save, stored_once
from dacnn.config import NetworkConfig
from dacnn.errors import CheckpointError, ConfigError
from dacnn.networks.adapted import Adapted
from dacnn.networks.factory import adapted_as
from dacnn.networks.plan import Input
from factories import FILE, GROUPS, KERNEL_PARAMETERS, Stateful, Tied, chain, lazy
from reference import one_thread  # noqa: F401  (a fixture)

CLASSES = ("Käse", "猫", *"23456789")
GREY = Input(32, 32, 1, (0.3,), (0.7,))
SETTINGS: list[dict[str, Any]] = [
    {},
    {"share": "all"},
    {"share": "stage", "regulator": "low-rank", "regulator_rank": 2},
    {"share": "template", "templates": 2, "regulator": "shift"},
    {"groups": ("a.0+e.0", "b.0+c.0")},
]


def made(name: str = "chain", **settings: Any) -> Adapted:
    """A network whose statistics and parameters are nothing special."""
    torch.manual_seed(1)
    network = adapted_as(NetworkConfig(f"{FILE}:{name}", **settings), GREY, CLASSES).train()
    for _ in range(3):
        network(images())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return network.eval()


def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 32, 32, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of a network whose kernels are shared."""
    save(made(share="all"), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def refused(path: Path, into: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, into)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_loaded_into_a_fresh_module_computes_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    network = made(**settings)
    save(network, tmp_path / "a")
    into = chain().train()
    before = {name: tensor.clone() for name, tensor in into.state_dict().items()}
    loaded = load(tmp_path / "a", into)
    assert isinstance(loaded, Adapted) and not loaded.training
    assert (loaded.input, loaded.classes, loaded.conversion) == (network.input, network.classes, network.conversion)
    assert torch.equal(loaded(images()), network(images()))
    assert into.training and all(torch.equal(into.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_loads_into_the_converted_module_too_and_into_a_network(settings: dict[str, Any], tmp_path: Path) -> None:
    network = made(**settings)
    save(network, tmp_path / "a")
    other = adapted_as(NetworkConfig(f"{FILE}:chain", **settings), GREY, CLASSES)
    for into in (other.module, other):
        loaded = load(tmp_path / "a", into)
        assert loaded is not into and torch.equal(loaded(images()), network(images()))


def test_a_factory_by_name_is_called_with_what_the_file_says(tmp_path: Path, file: Path) -> None:
    assert torch.equal(load(file, f"{FILE}:chain")(images()), load(file, chain())(images()))
    assert torch.equal(load(file, f"{FILE}:fixed")(images()), load(file, chain())(images()))
    seven = adapted_as(NetworkConfig(f"{FILE}:chain", share="all"), Input(), tuple("abcdefg"))
    save(seven, tmp_path / "seven")
    loaded = load(tmp_path / "seven", f"{FILE}:chain")
    assert loaded.classes == tuple("abcdefg") and loaded.input == Input()


def test_a_bare_module_comes_back_bare(tmp_path: Path) -> None:
    shared, mapping = dacnn.anchor(chain().eval())
    save(shared, tmp_path / "a")
    loaded = load(tmp_path / "a", chain())
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(loaded(x), shared(x))
    assert dacnn.anchor(chain())[1] == mapping and type(loaded) is nn.Sequential
    assert "was saved as a bare module" in refused(tmp_path / "a", f"{FILE}:chain")


def test_a_module_that_shares_nothing_can_be_saved_as_well(tmp_path: Path) -> None:
    module = chain().eval()
    save(module, tmp_path / "a")
    assert load_file(tmp_path / "a").keys() == module.state_dict().keys()
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(load(tmp_path / "a", chain())(x), module(x))


def test_a_lazy_module_is_loaded_into_without_having_run(tmp_path: Path) -> None:
    network = made("lazy", share="all")
    save(network, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a", f"{FILE}:lazy")(images()), network(images()))
    # PyTorch cannot copy a lazy norm, and a module that is given stays as it is
    assert "LazyModule" in refused(tmp_path / "a", lazy(10))
    with pytest.raises(CheckpointError, match="is lazy and has no shape yet: run the module once"):
        save(nn.Sequential(nn.LazyLinear(3)), tmp_path / "b")


def test_a_compiled_module_is_saved_as_the_module_inside(tmp_path: Path) -> None:
    shared, _ = dacnn.anchor(chain())
    save(torch.compile(shared, backend="eager"), tmp_path / "a")  # type: ignore[arg-type]
    save(shared, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ---------------------------------------------------------------- what is in a file


def test_a_file_holds_each_kernel_once_and_opens_with_safetensors_alone(file: Path) -> None:
    network = made(share="all")
    tensors = load_file(file)
    kernels = [name for name, tensor in tensors.items() if tuple(tensor.shape) == (8, 8, 3, 3)]
    assert len(kernels) == 1 and ".anchors." in kernels[0]
    # the counters of the batch norms are no parameters, its statistics are no parameters either
    stored = sum(tensor.numel() for name, tensor in tensors.items() if "running" not in name and "num_batches" not in name)
    assert stored == sum(parameter.numel() for parameter in network.parameters())
    plain = sum(parameter.numel() for parameter in made().parameters())
    assert plain - stored == 4 * KERNEL_PARAMETERS
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = json.loads(opened.metadata()["dacnn"])
    assert metadata["conversion"]["groups"] == {"conv8x8x3x3": list(GROUPS["all"][0])}
    assert metadata["classes"] == list(CLASSES) and "plan" not in metadata
    assert set(map(str, tensors)) == set(stored_once(network.module.state_dict()))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_network_writes_the_same_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    save(made(**settings), tmp_path / "a")
    save(made(**settings), tmp_path / "b")
    save(load(tmp_path / "a", chain()), tmp_path / "c")
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1


def test_the_order_in_memory_is_not_in_the_file(file: Path, tmp_path: Path) -> None:
    other = load(file, chain()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save(other, tmp_path / "b")
    assert file.read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(load(tmp_path / "b", chain())(images()), load(file, chain())(images()))


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys, torch, dacnn, factories; torch.manual_seed(3); dacnn.save(dacnn.anchor(factories.chain())[0], sys.argv[1])"
    )
    paths = os.pathsep.join([str(FILE.parent), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, env=environment)
    torch.manual_seed(3)
    save(dacnn.anchor(chain())[0], tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tied_parameters_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    network = made("Tied", share="all")
    save(network, tmp_path / "a")
    tensors = load_file(tmp_path / "a")
    assert "first.weight" in tensors and "second.weight" not in tensors
    for into in (Tied(), f"{FILE}:Tied"):
        loaded = load(tmp_path / "a", into)
        assert loaded.module.second.weight is loaded.module.first.weight
        assert torch.equal(loaded(images()), network(images()))
        assert torch.equal(loaded.module.row, loaded.module.table[2:5])
    untied = Tied()
    untied.second.weight = nn.Parameter(untied.first.weight.detach().clone())
    assert "tensor 'second.weight' has shape none, the network expects (8, 8, 3, 3)" in refused(tmp_path / "a", untied)
    assert dacnn.count(network).stored_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_state_that_is_no_tensor_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'_extra_state' of the state is a dict"):
        save(Stateful(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what is refused


def test_without_a_module_the_error_says_what_to_do(file: Path) -> None:
    message = refused(file, None)
    assert "dacnn.load(path, into=factory()), or --into FILE.py:factory" in message


def test_a_network_of_the_zoo_takes_no_module(tmp_path: Path) -> None:
    save(dacnn.create("dacnn3", width=4), tmp_path / "a")
    for into in (chain(), "absent.py:make"):
        assert "holds a whole network: leave out the module" in refused(tmp_path / "a", into)


def test_another_module_is_refused_with_what_differs(file: Path) -> None:
    assert "the module has no layer 'a.0' that can share a kernel" in refused(file, nn.Sequential(nn.Linear(3, 3)))
    assert "tensor 'head.bias' has shape (10,), the network expects (7,)" in refused(file, chain(7))
    assert "tensor 'stem.0.weight'" in refused(file, chain(10, 3))
    assert "tensor 'extra.weight' has shape none" in refused(file, changed_chain())
    other, _ = dacnn.anchor(chain(), [["a.0", "b.0"]])
    assert "shares other kernels than the one in the file" in refused(file, other)
    regulated, _ = dacnn.anchor(chain(), regulator="shift")
    assert "shares other kernels than the one in the file" in refused(file, regulated)
    with torch.device("meta"):
        meta = chain()
    assert "on the meta device" in refused(file, meta)


def changed_chain() -> nn.Module:
    module = chain()
    module.add_module("extra", nn.PReLU())
    return module


def test_a_file_that_shares_nothing_is_refused_by_a_module_that_shares(tmp_path: Path) -> None:
    save(made(), tmp_path / "a")
    assert "shares other kernels than the one in the file" in refused(tmp_path / "a", dacnn.anchor(chain())[0])


@pytest.mark.parametrize("into", ["absent.py:make", f"{FILE}", f"{FILE}:absent", f"{FILE}:fails", "factories"])
def test_a_factory_that_cannot_be_called_is_refused(into: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"factories|absent"):
        load(file, into)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("conversion", None),
        ("conversion", []),
        ("conversion", {"groups": 5}),
        ("conversion", {"groups": {"kernel": 5}}),
        ("conversion", {"groups": {"kernel": ["a.0", "b.0"]}}),
        ("conversion", {"groups": {"a.b": ["a.0", "b.0"]}}),
        ("conversion", {"groups": {"": ["a.0", "b.0"]}}),
        ("conversion", {"groups": {"forward": ["a.0", "b.0"]}}),
        ("conversion", {"groups": {"conv8x8x3x3": ["a.0", "absent"]}}),
        ("conversion", {"groups": {"conv8x8x3x3": ["a.0", "stem.0"]}}),
        ("conversion", {"groups": {"k": ["a.0", "b.0"]}, "regulator": "absent"}),
        ("conversion", {"groups": {"k": ["a.0", "b.0"]}, "regulator": 5}),
        ("conversion", {"groups": {"k": ["a.0", "b.0"]}, "regulator": "low-rank", "regulator_rank": -1}),
        ("conversion", {"groups": {"k": ["a.0", "b.0"]}, "templates": "x"}),
        ("conversion", {"groups": {"k": ["a.0", "b.0"]}, "templates": 0}),
        ("conversion", {"groups": {}, "something": 1}),
        ("input", 5),
        ("input", {"height": -1}),
        ("classes", 5),
        ("classes", None),
        ("format", 2),
    ],
)
def test_an_edited_description_is_refused(key: str, value: object, file: Path) -> None:
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = json.loads(opened.metadata()["dacnn"])
    save_file(load_file(file), file, {"dacnn": json.dumps(metadata | {key: value})})
    refused(file, chain())


def test_an_edited_tensor_is_refused(file: Path) -> None:
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "head.bias"}, file, metadata)
    assert "tensor 'head.bias' has shape none" in refused(file, chain())
    save_file(tensors | {"head.bias": torch.zeros(10, dtype=torch.int64)}, file, metadata)
    assert "is of torch.int64, expected torch.float32" in refused(file, chain())
