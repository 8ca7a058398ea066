"""One `.safetensors` file holds a network: each kernel once, the norms, and the plan as text in its metadata.

Nothing is ever unpickled. Files are written beside their place and renamed, so that a reader sees the old file or the
new one, never a part.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as to_safetensors_bytes
from torch import Tensor

from dacnn.errors import CheckpointError, DacnnError
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan

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
        tensors: Contiguous tensors by name.
        metadata: Anything JSON can say.

    Raises:
        CheckpointError: The file cannot be written.
    """
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    content = to_safetensors_bytes({name: tensor.detach().cpu() for name, tensor in tensors.items()}, {_METADATA_KEY: text})
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


def save(network: Network, path: str | Path) -> None:
    """Write a network into one `.safetensors` file: each kernel once, its plan beside it.

    Args:
        network: The network.
        path: The file; an older one is replaced as a whole.

    Raises:
        CheckpointError: The file cannot be written.
    """
    save_tensors(
        Path(path),
        getattr(network, "_orig_mod", network).state_dict(),
        {"format": _FORMAT, "plan": json.loads(network.plan.to_json())},
    )


def load(path: str | Path) -> Network:
    """Read a network that `save` or a training wrote.

    Args:
        path: A `.safetensors` file, or a run directory, of which the best weights are taken, else the last.

    Returns:
        The network, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: There is no such file, or it holds something else.
    """
    path = weights_path(Path(path))
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: is of format {metadata.get('format')}, this version reads {_FORMAT}: use a newer dacnn")
    try:
        plan = Plan.from_json(json.dumps(metadata.get("plan")))
        with torch.device("meta"):
            network = Network(plan)
    except DacnnError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _check_fit(network, tensors, path)
    network = network.to_empty(device="cpu")
    network.load_state_dict(tensors)
    network.normalize.reset_statistics()
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


def _check_fit(network: Network, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file whose tensors are not those of its plan."""
    wanted = network.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: tensor '{name}' has shape {found.get(name, 'none')}, the plan in the file expects "
                f"{expected.get(name, 'none')}: the file is damaged or was edited"
            )
        if tensors[name].is_floating_point() != wanted[name].is_floating_point():
            raise CheckpointError(
                f"{path}: tensor '{name}' is of {tensors[name].dtype}, expected {wanted[name].dtype}: the file was edited"
            )
