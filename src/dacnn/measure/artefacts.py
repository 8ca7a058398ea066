"""An artefact of any format -> what it stores."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dacnn.checkpoint import weights_path
from dacnn.errors import ArtefactError
from dacnn.measure.onnx_arrays import read_onnx
from dacnn.measure.pt2 import is_pt2, read_pt2
from dacnn.measure.stored import Artefact
from dacnn.measure.tensors import read_module, read_pt, read_safetensors

KNOWN = "a run directory, .safetensors, .pt, .pt2 or .onnx"
# what hides its numbers, by how it begins
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
# of a file, to tell text by
_BEGINNING = 4096


def format_of(path: Path) -> str:
    """Recognise a file by what it begins with, where that says nothing by its ending.

    Args:
        path: The file.

    Returns:
        `safetensors`, `pt`, `pt2` or `onnx`; `bytes` where it is something else.

    Raises:
        ArtefactError: There is no such file, or it is empty.
    """
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file: expected {KNOWN}")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not start:
        raise ArtefactError(f"{path}: is empty: expected {KNOWN}")
    # zip files also begin behind others, such as TensorFlow Lite's metadata behind a model
    if start.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        return "pt2" if is_pt2(path) else "pt"
    # eight bytes say how long the header is, which is JSON
    is_header = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size
    if is_header or path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in {".onnx", ".pt2"}:
        return path.suffix[1:]
    # a pickle of protocol 2 or later, which torch.save wrote before it wrote zip files
    if (start[0] == 0x80 and start[1:2] in (b"\2", b"\3", b"\4", b"\5")) or path.suffix in {".pt", ".pth"}:
        return "pt"
    return "bytes"


def read_bytes(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file in which kernels can be searched for.

    Args:
        path: The file.

    Returns:
        Shape (N,); they are read from the file when they are looked at.

    Raises:
        ArtefactError: It cannot be read, or is compressed, or text.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_BEGINNING)
        data: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ArtefactError(f"{path}: is compressed by {name}, where no kernel can be seen: unpack it first")
    if start.isascii() and b"\0" not in start:
        raise ArtefactError(f"{path}: is text, in which no numbers are searched for: audit what is compiled of it")
    return data


def read_artefact(artefact: str | Path | nn.Module) -> Artefact:
    """Read what an artefact stores.

    Args:
        artefact: A run directory, a file, or a live module.

    Returns:
        Its arrays of two and more dimensions.

    Raises:
        ArtefactError: It cannot be read, or is of no known format.
        CheckpointError: A directory holds no weights.
    """
    if isinstance(artefact, nn.Module):
        writer = "fx" if isinstance(artefact, torch.fx.GraphModule) else ""
        return Artefact(type(artefact).__name__, "module", writer, read_module(artefact))
    path = weights_path(Path(artefact))
    kind = format_of(path)
    writer = ""
    if kind == "bytes":
        raise ArtefactError(
            f"{path}: is of no known format: expected {KNOWN}; "
            "in any other file kernels are searched for, if it is told which (--against)"
        )
    if kind == "onnx":
        arrays, writer = read_onnx(path)
    elif kind == "safetensors":
        arrays, _ = read_safetensors(path)
    else:
        arrays = read_pt2(path) if kind == "pt2" else read_pt(path)
    return Artefact(str(path), kind, writer, arrays)
