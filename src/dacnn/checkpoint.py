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
from torch.nn.parameter import is_lazy

from dacnn.errors import CheckpointError, ConfigError, DacnnError, PlanError, told
from dacnn.networks.adapted import Adapted
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import make_module
from dacnn.networks.network import Network
from dacnn.networks.plan import Input, Plan, from_plain, to_plain
from dacnn.sharing.anchors import Anchors
from dacnn.sharing.conversion import Conversion
from dacnn.sharing.convert import conversion_of, convert
from dacnn.sharing.readers import owner_of

# key of the one metadata entry; its value is one sorted JSON string, so that the same network writes the same bytes
_METADATA_KEY = "dacnn"
_FORMAT = 1


def check_place(path: Path) -> None:
    """Refuse a place where no file can be put, before work is done whose result would be lost.

    Args:
        path: Where a file shall stand.

    Raises:
        CheckpointError: It is a folder, a device or a pipe, or lies in no folder.
    """
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written: there is no folder {path.parent}: make it first")
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise CheckpointError(f"{path}: cannot be written: it is {kind}: expected the name of a file")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that nobody sees it half-written.

    Args:
        path: Where the file shall stand; what a link names is replaced, not the link.

    Yields:
        A path beside it; what is written there takes the place of `path` when the block ends without an error.

    Raises:
        CheckpointError: The file cannot be written.
    """
    check_place(path)
    place = path.resolve() if path.is_symlink() else path
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=place.parent)
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
        beside.replace(place)
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
    # a copy of each: a view of another tensor's memory is refused
    copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    content = to_safetensors_bytes(copies, {_METADATA_KEY: text})
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

    Raises:
        CheckpointError: Something is no tensor, or has no shape yet.
    """
    seen: set[tuple[object, ...]] = set()
    once: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"'{name}' of the state is a {type(tensor).__name__}: a .safetensors file holds tensors alone"
            )
        if is_lazy(tensor):
            raise CheckpointError(f"'{name}' is lazy and has no shape yet: run the module once")
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
        CheckpointError: The file cannot be written, or a kernel is not stored as itself: pruned, or parametrized.
        PlanError: Kernels are shared by a part of the module alone.
    """
    network = getattr(network, "_orig_mod", network)
    _check_plain(network)
    metadata: dict[str, Any] = {"format": _FORMAT}
    if isinstance(network, Classifier) and network.ranges is not None:
        metadata["ranges"] = network.ranges
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
def load(path: str | Path, into: str | None) -> Classifier: ...
@overload
def load(path: str | Path, into: nn.Module) -> nn.Module: ...


def load(path: str | Path, into: nn.Module | str | None = None) -> nn.Module:
    """Read a network that `save` or a training wrote.

    Args:
        path: A `.safetensors` file, or a run directory, of which the best weights are taken, else the last.
        into: For a file of a converted module: a fresh module like the one it was made from, which is left as it is, or the
            FILE.py:factory that makes one.

    Returns:
        The network, in evaluation mode; one of this library on the CPU, a converted module where `into` is.

    Raises:
        CheckpointError: There is no such file, it holds something else, or `into` is another module.
        ConfigError: The factory cannot be called.
    """
    path = weights_path(Path(path))
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: is of format {metadata.get('format')}, this version reads {_FORMAT}: use a newer dacnn")
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
    network.ranges = ranges_of(metadata, path)
    return network.eval()


def _load_converted(
    path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any], into: nn.Module | str | None
) -> nn.Module:
    """A module with the kernels and the weights of the file."""
    if into is None:
        raise CheckpointError(
            f"{path}: holds the weights of a converted module, not its layers: give a fresh one, "
            "dacnn.load(path, into=factory()), or --into FILE.py:factory where a command takes it"
        )
    try:
        conversion, described = Conversion.from_table(metadata["conversion"]), _described(metadata)
        module = _fresh(into, described)
        network = Adapted(module, *described) if described else None
        if network and any(map(is_lazy, module.state_dict().values())):
            network.try_out()
        if owner_of(module) is None:
            module = convert(module, conversion)
        elif conversion_of(module) != dataclasses.replace(conversion, refused={}):
            raise PlanError("the module shares other kernels than the one in the file: give one that shares none")
    except ConfigError:
        raise
    except (DacnnError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its conversion cannot be done: {told(error)}") from None
    _check_fit(stored_once(module.state_dict()), tensors, path)
    try:
        # a tensor of several names is in the file under the first
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
    if network is None:
        return module.eval()
    network.module = module
    network.ranges = ranges_of(metadata, path)
    return network.eval()


def ranges_of(metadata: Mapping[str, Any], path: Path) -> dict[str, tuple[float, float]] | None:
    """The ranges of a network's values that stand in a file.

    Args:
        metadata: Of the file.
        path: The file, for the message.

    Returns:
        Low and high end by name; None: there are none.

    Raises:
        CheckpointError: The file was edited.
    """
    if metadata.get("ranges") is None:
        return None
    try:
        return {str(name): (float(low), float(high)) for name, (low, high) in metadata["ranges"].items()}
    except (AttributeError, TypeError, ValueError):
        raise CheckpointError(f"{path}: its ranges are no pairs of numbers: the file was edited") from None


def _fresh(into: nn.Module | str, described: tuple[Input, tuple[str, ...]] | None) -> nn.Module:
    """A module of our own to load into."""
    if isinstance(into, nn.Module):
        if any(parameter.is_meta for parameter in into.parameters()):
            raise ValueError("the module is on the meta device, where there is nothing to load into: make it in memory")
        return copy.deepcopy(into.module if isinstance(into, Adapted) else into)
    if described is None:
        raise ValueError("was saved as a bare module, which does not say what it takes: load it from Python, into a module")
    input, classes = described
    return make_module(into, num_classes=len(classes), in_channels=input.channels)


def _described(metadata: Mapping[str, Any]) -> tuple[Input, tuple[str, ...]] | None:
    """What a converted network takes and which classes it tells apart; None: it was saved as a bare module."""
    if "input" not in metadata:
        return None
    classes = metadata.get("classes")
    if not isinstance(classes, list):
        raise ValueError(f"its classes are {classes!r}: expected their names")
    input: Input = from_plain(Input, metadata["input"])
    return input, tuple(map(str, classes))


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


def _check_plain(network: nn.Module) -> None:
    """Refuse kernels that are made of other tensors, which a file could not tell of; somebody else's layers know theirs."""
    for name, part in network.named_modules():
        if not isinstance(part, Anchors) and not isinstance(network, Network):
            continue
        made = [key for key in getattr(part, "parametrizations", {})]
        made += [key.removesuffix("_orig") for key in part._parameters if f"{key.removesuffix('_orig')}_mask" in part._buffers]
        if made:
            tensor = f"{name}.{made[0]}".removeprefix(".")
            raise CheckpointError(
                f"'{tensor}' is made of other tensors whenever it is read (pruned, or parametrized): make it what it is by "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations before it is saved"
            )


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
