"""The tensors of a `.pt2` file, read without PyTorch's loader, which may run what a file asks for."""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dacnn.errors import ArtefactError
from dacnn.measure.stored import StoredArray
from dacnn.measure.tensors import to_arrays

# numbers of torch._export.serde.schema.ScalarType, which are part of the format
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
# operators that read a kernel themselves
_LAYERS = re.compile(r"torch\.ops\.aten\.(_?conv\w*|linear|addmm|mm|matmul|bmm)\.")
_SYMBOL = re.compile(r"Symbol\('[a-z]+\d+'(, (positive|integer|nonnegative)=True)*\)")
_ARITHMETIC = re.compile(r"(FloorDiv|Mod|Max|Min|Integer|Add|Mul|[\d\s+\-*(),/])*")


class Archive:
    """An opened `.pt2` file."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Args:
            path: The file.

        Raises:
            ArtefactError: It is no such archive, or is damaged.
        """
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            entries = self._zip.infolist()
        except (OSError, zipfile.BadZipFile) as error:
            raise ArtefactError(f"{path}: not a readable .pt2 file: {error}: export it anew") from None
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ArtefactError(f"{path}: has compressed entries: expected a file that torch.export.save wrote")
        # PyTorch's writer puts one folder around everything, others do not
        roots = {entry.filename.split("/")[0] for entry in entries}
        self._root = f"{roots.pop()}/" if len(roots) == 1 else ""
        self.entries = [entry.filename.removeprefix(self._root) for entry in entries]

    def read(self, entry: str) -> bytes:
        """The bytes of an entry."""
        try:
            return self._zip.read(self._root + entry)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ArtefactError(f"{self.path}: '{entry}' cannot be read: {error}: export it anew") from None

    def json(self, entry: str) -> Any:
        """The content of a JSON entry."""
        try:
            return json.loads(self.read(entry))
        except (ValueError, RecursionError) as error:
            raise ArtefactError(f"{self.path}: '{entry}' is no JSON: {error}: export it anew") from None

    def pickled(self, entry: str) -> Any:
        """A pickled entry that holds tensors alone; anything else is refused."""
        try:
            return torch.load(io.BytesIO(self.read(entry)), map_location="cpu", weights_only=True)
        except ArtefactError:
            raise
        except Exception:  # whatever a hostile pickle makes of the reader
            raise ArtefactError(
                f"{self.path}: '{entry}' holds a pickle of more than tensors, which is not read: export plain tensors"
            ) from None


def is_pt2(path: Path) -> bool:
    """Whether a zip file is a `.pt2` archive and not what `torch.save` writes."""
    entries = Archive(path).entries
    return "archive_format" in entries or any(entry.startswith("serialized_state_dict") for entry in entries)


def _strided(raw: bytes, meta: Any) -> Tensor:
    dtype = _DTYPES[meta["dtype"]]
    sizes = [size["as_int"] for size in meta["sizes"]]
    strides = [stride["as_int"] for stride in meta["strides"]]
    storage = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return storage.as_strided(sizes, strides, meta["storage_offset"]["as_int"])


def _configured(archive: Archive, config: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a `*_config.json` names; names of one payload share its memory."""
    folder = config.rsplit("/", 1)[0]
    payloads: dict[str, Tensor] = {}
    for name, payload in archive.json(config)["config"].items():
        entry = f"{folder}/{payload['path_name']}"
        if entry.rsplit("/", 1)[1].startswith(("custom_obj", "opaque_obj")):
            continue
        if payload["use_pickle"]:
            yield name, archive.pickled(entry)
        elif payload["tensor_meta"]["dtype"] in _DTYPES:
            if entry not in payloads:
                payloads[entry] = _strided(archive.read(entry), payload["tensor_meta"])
            meta = payload["tensor_meta"]
            sizes, strides = ([value["as_int"] for value in meta[key]] for key in ("sizes", "strides"))
            yield name, payloads[entry].as_strided(sizes, strides, meta["storage_offset"]["as_int"])


def _tensors(archive: Archive) -> Iterator[tuple[str, str, Tensor]]:
    for entry in archive.entries:
        if entry.endswith(("_weights_config.json", "_constants_config.json")):
            place = "weight" if "_weights_" in entry else "constant"
            for name, tensor in _configured(archive, entry):
                yield name, place, tensor
        # PyTorch before 2.9 pickled the whole state dict
        elif re.fullmatch(r"data/(weights|constants)/[^/]*\.pt|serialized_(state_dict|constants)\.pt", entry):
            for name, tensor in archive.pickled(entry).items():
                yield name, "constant" if "constants" in entry else "weight", tensor


def _uses(nodes: Any) -> dict[str, int | None]:
    """How many layers read each value of a graph; None where another operator reads it, whose result may have many readers."""
    counts: dict[str, int | None] = {}
    for node in nodes:
        for argument in node["inputs"]:
            tensor = argument["arg"].get("as_tensor") if isinstance(argument["arg"], dict) else None
            if tensor:
                before = counts.get(tensor["name"], 0)
                reads = before is not None and _LAYERS.match(node["target"])
                counts[tensor["name"]] = before + 1 if reads and before is not None else None
    return counts


def _readers(archive: Archive) -> dict[str, int]:
    """How many layers read each tensor, by the tensor's name; without those for which that cannot be told."""
    found: dict[str, int] = {}
    for entry in archive.entries:
        if not re.fullmatch(r"models/[^/]*\.json", entry):
            continue
        module = archive.json(entry)["graph_module"]
        uses = _uses(module["graph"]["nodes"])
        for spec in module["signature"]["input_specs"]:
            for kind in ("parameter", "buffer", "tensor_constant"):
                count = uses.get(spec[kind]["arg"]["name"], 0) if kind in spec else None
                if count is not None:
                    found[spec[kind][f"{kind}_name"]] = count
    return found


def read_pt2(path: Path) -> tuple[StoredArray, ...]:
    """Read the weights and constants of what `torch.export.save` wrote; nothing in it is run.

    Args:
        path: The file.

    Returns:
        Its arrays; names that share a payload are one.

    Raises:
        ArtefactError: It is damaged, or a tensor lies in a pickle of more than tensors.
    """
    archive = Archive(path)
    try:
        return to_arrays(_tensors(archive), str(path), _readers(archive))
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        if isinstance(error, ArtefactError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ArtefactError(f"{path}: is damaged or of a newer format: {reason}: export it anew") from None


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield key, child
            yield from _walk(child)
    elif isinstance(value, list):
        for child in value:
            yield from _walk(child)


def code_in(path: Path) -> str | None:
    """Why `torch.export.load` might run code that a file brings along.

    The loader falls back to full unpickling, evaluates expressions over sizes, compiles guards and looks operators up by
    path; what is none of the ordinary forms of these counts as code.

    Args:
        path: The file.

    Returns:
        The reason; None where the file holds tensors and PyTorch's own operators alone.

    Raises:
        ArtefactError: The file is damaged.
    """
    archive = Archive(path)
    for entry in archive.entries:
        if "aotinductor" in entry or "custom_obj" in entry or "opaque_obj" in entry:
            return f"it holds '{entry}'"
        if entry.endswith(".pt"):
            try:
                archive.pickled(entry)
            except ArtefactError:
                return f"'{entry}' is a pickle of more than tensors"
        if entry.endswith(".json"):
            for key, value in _walk(archive.json(entry)):
                if key == "use_pickle" and value:
                    return f"'{entry}' names pickled tensors"
                if key == "guards_code" and value:
                    return f"'{entry}' holds guards in Python"
                if key == "target" and not re.match(r"torch\.ops\.|_operator\.", str(value)):
                    return f"'{entry}' calls '{value}'"
                if key == "expr_str" and not _ARITHMETIC.fullmatch(_SYMBOL.sub("1", str(value))):
                    return f"'{entry}' holds the expression '{value}'"
    return None
