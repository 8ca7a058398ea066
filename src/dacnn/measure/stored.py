"""What an artefact stores: arrays, each with the names under which it is known and the place where it lies."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# smaller arrays are no kernels worth a byte count, and too small to tell a copy from chance
SMALLEST_KERNEL = 64


@dataclass(frozen=True, eq=False)
class StoredArray:
    """One array that is stored once, however many names it has.

    Attributes:
        names: Every name of these bytes, the first one first.
        place: What it is there: `tensor`, `parameter`, `initialiser`, `Constant node`, ...
        values: The numbers; bfloat16 and float8 widened to float32, everything else as stored.
        dtype: The type as stored: `float32`, `bfloat16`, `int8`, ...
        nbytes: Bytes that it takes where it is stored.
        readers: How many layers read it, where the artefact tells; None where it does not.
        blocked: Whether the artefact says that its channels are blocked (ONNX Runtime's NCHWc operators).
    """

    names: tuple[str, ...]
    place: str
    values: NDArray[Any]
    dtype: str
    nbytes: int
    readers: int | None = None
    blocked: bool = False

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@dataclass(frozen=True, eq=False)
class Artefact:
    """Everything that an artefact stores and that may be a kernel.

    Attributes:
        label: What to call it in a report: its path, or the class of a module.
        format: `safetensors`, `pt`, `pt2`, `onnx` or `module`.
        writer: Which tool left its traces in it: `onnxruntime`, `legacy-onnx`, `fx`, or empty.
        arrays: The arrays of two and more dimensions.
    """

    label: str
    format: str
    writer: str
    arrays: tuple[StoredArray, ...]


def may_be_kernel(shape: Sequence[int], dtype: str) -> bool:
    """Whether an array of this shape and type can be a kernel: not tiny, no vector, no mask, no positions."""
    return (
        len(shape) >= 2 and math.prod(shape) >= SMALLEST_KERNEL and not dtype.startswith(("bool", "int64", "complex", "string"))
    )


def is_trivial(values: NDArray[Any]) -> bool:
    """Whether an array says nothing of its own: a constant, an identity, a selection or a shift of channels.

    Many layers start with the same identity, and nobody would call that a copied kernel.
    """
    if not np.any(values != values.flat[0]):
        return True
    flat = values.reshape(values.shape[0], -1)
    if np.count_nonzero(flat, axis=1).max() > 1:
        return False
    entries = flat[flat != 0]
    return bool(np.all(entries == entries[0]))
