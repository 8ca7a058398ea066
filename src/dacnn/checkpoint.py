"""One `.safetensors` file holds a network: each kernel once, the norms, and the plan as text in its metadata.

Nothing is ever unpickled. Files are written beside their place and renamed, so that a reader sees the old file or the
new one, never a part.
"""

import contextlib
import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, overload

import safetensors
import torch
from safetensors.torch import save as to_safetensors_bytes
from torch import Tensor, nn

from dacnn.errors import CheckpointError, DacnnError, PlanError
from dacnn.networks.adapted import Adapted
from dacnn.networks.network import Network
from dacnn.networks.plan import Input, Plan, from_plain, to_plain
from dacnn.sharing.conversion import Conversion
from dacnn.sharing.convert import conversion_of, convert
from dacnn.sharing.readers import owner_of

# key of the one metadata entry; its value is one sorted JSON string, so that the same network writes the same bytes
_METADATA_KEY = "dacnn"
_FORMAT = 1


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that nobody sees it half-written.

    Args:
        path: Where the file shall stand.

    Yields:
        A path beside it; what is written there takes the place of `path` when the block ends without an error.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}: expected an existing folder with room in it"
        ) from None
    beside = Path(name)
    try:
        # mkstemp makes files that only their owner reads; a checkpoint is an ordinary file
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: object) -> None:
    """Write named tensors and one JSON value, atomically.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: Anything JSON can say.

    Raises:
        CheckpointError: The file cannot be written.
    """
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    content = to_safetensors_bytes(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {_METADATA_KEY: text}
    )
    with replacing(path) as beside:
        beside.write_bytes(content)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read what `save_tensors` wrote.

    Args:
        path: The file.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        CheckpointError: There is no such file, or it holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: expected a .safetensors file or a run directory")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file: {error}") from None
    try:
        metadata = json.loads(text or "")
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path}: has no '{_METADATA_KEY}' metadata: expected a file that dacnn.save or `dacnn train` wrote"
        )
    return tensors, metadata


def stored_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which a tensor that has several names has its first one only.

    Args:
        state: Names and tensors.

    Returns:
        The names that hold something new.
    """
    seen: set[tuple[object, ...]] = set()
    once: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if place not in seen:
            once[name] = tensor
        seen.add(place)
    return once


def save(network: nn.Module, path: str | Path) -> None:
    """Write a network into one `.safetensors` file: each kernel once, and beside it how it is put together.

    Args:
        network: A network of this library, or a module that `dacnn.anchor` converted; of the latter, the layers are not
            in the file: `load` takes a fresh module for them.
        path: The file; an older one is replaced as a whole.

    Raises:
        CheckpointError: The file cannot be written.
    """
    network = getattr(network, "_orig_mod", network)
    metadata: dict[str, Any] = {"format": _FORMAT}
    if isinstance(network, Network):
        metadata["plan"] = json.loads(network.plan.to_json())
    elif isinstance(network, Adapted):
        metadata |= {"input": to_plain(network.input), "classes": list(network.classes)}
        network = network.module
    if not isinstance(network, Network):
        metadata["conversion"] = conversion_of(network).to_table()
    save_tensors(Path(path), stored_once(network.state_dict()), metadata)


@overload
def load(path: str | Path) -> Network: ...
@overload
def load(path: str | Path, into: nn.Module) -> nn.Module: ...
@overload
def load(path: str | Path, into: nn.Module | None) -> nn.Module: ...


def load(path: str | Path, into: nn.Module | None = None) -> nn.Module:
    """Read a network that `save` or a training wrote.

    Args:
        path: A `.safetensors` file, or a run directory, of which the best weights are taken, else the last.
        into: For a file of a converted module: a fresh module like the one it was made from; left as it is.

    Returns:
        The network, in evaluation mode; one of this library on the CPU, a converted module where `into` is.

    Raises:
        CheckpointError: There is no such file, or it holds something else.
        PlanError: `into` is another module than the one that was converted.
    """
    path = weights_path(Path(path))
    tensors, metadata = _read(path)
    if "conversion" in metadata:
        return _load_converted(path, tensors, metadata, into)
    if into is not None:
        raise CheckpointError(f"{path}: holds a whole network: leave out the module that it should be loaded into")
    try:
        plan = Plan.from_json(json.dumps(metadata.get("plan")))
        with torch.device("meta"):
            network = Network(plan)
    except DacnnError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _check_fit(network.state_dict(), tensors, path)
    network = network.to_empty(device="cpu")
    network.load_state_dict(tensors)
    network.normalize.reset_statistics()
    return network.eval()


def described(path: str | Path) -> tuple[Input, tuple[str, ...]]:
    """What the network in a file takes, and which classes it tells apart.

    Args:
        path: A `.safetensors` file or a run directory.

    Returns:
        The input and the names of the classes.

    Raises:
        CheckpointError: There is no such file, or it does not say.
    """
    path = weights_path(Path(path))
    _, metadata = _read(path)
    try:
        if "plan" in metadata:
            plan = Plan.from_json(json.dumps(metadata["plan"]))
            return plan.input, plan.classes
        return _input_and_classes(metadata)
    except (DacnnError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _input_and_classes(metadata: Mapping[str, Any]) -> tuple[Input, tuple[str, ...]]:
    if not {"input", "classes"} <= metadata.keys() or not isinstance(metadata["classes"], list):
        raise ValueError("does not say what the network takes: it was saved as a bare module, so load it from Python")
    input: Input = from_plain(Input, metadata["input"])
    return input, tuple(map(str, metadata["classes"]))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: is of format {metadata.get('format')}, this version reads {_FORMAT}: use a newer dacnn")
    return tensors, metadata


def _load_converted(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any], into: nn.Module | None) -> nn.Module:
    """A module with the kernels and the weights of the file."""
    if into is None:
        raise CheckpointError(
            f"{path}: holds the weights of a converted module, not its layers: give a fresh one, "
            "dacnn.load(path, into=factory()), or --into FILE.py:factory"
        )
    try:
        conversion = Conversion.from_table(metadata["conversion"])
        if owner_of(into) is None:
            module = convert(into, conversion)
        elif conversion_of(into) == dataclasses.replace(conversion, refused={}):
            module = copy.deepcopy(into)
        else:
            raise PlanError("the module shares other kernels than the one in the file: give one that shares none")
        network = Adapted(module, *_input_and_classes(metadata)) if "input" in metadata else module
    except (DacnnError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    _check_fit(stored_once(module.state_dict()), tensors, path)
    # a tensor of several names is in the file under the first
    module.load_state_dict(tensors, strict=False)
    return network.eval()


def weights_path(path: Path) -> Path:
    """The file that holds the weights of a run.

    Args:
        path: A run directory, or a file, which is returned as it is.

    Returns:
        The file.

    Raises:
        CheckpointError: The directory holds no weights.
    """
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: holds no best.safetensors and no last.safetensors: expected a run of `dacnn train`")


def _check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file whose tensors are not those of its network."""
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: tensor '{name}' has shape {found.get(name, 'none')}, the network expects "
                f"{expected.get(name, 'none')}: the file is damaged or was edited, or is of another network"
            )
        if tensors[name].is_floating_point() != wanted[name].is_floating_point():
            raise CheckpointError(
                f"{path}: tensor '{name}' is of {tensors[name].dtype}, expected {wanted[name].dtype}: the file was edited"
            )
