"""Pickles read without running what they ask for: builtin types and NumPy arrays of integers, nothing else.

A pickle is a program that calls what it names. Here it may name only the five functions with which NumPy has written
arrays since Python 2, and each of those is replaced by an inert stand-in of this file, so that no foreign code runs.
"""

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from dacnn.data.reasons import reason
from dacnn.errors import DataError


class _Kind:
    """Stands in for `numpy.dtype`: whole numbers only."""

    def __init__(self, name: Any = "O", *_: Any) -> None:
        self.name = name.decode("latin-1") if isinstance(name, bytes) else str(name)
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode("latin-1") if isinstance(order, bytes) else str(order)

    def dtype(self) -> "np.dtype[Any]":
        if self.name.lstrip("|<>=") not in {"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"} or self.order not in "<>|=":
            raise pickle.UnpicklingError(f"an array of type {self.name!r}")
        return np.dtype(self.name.lstrip("|<>=")).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stands in for `numpy.ndarray`."""

    array: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        self.array = np.frombuffer(bytes(raw), kind.dtype()).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(raw: Any, kind: _Kind, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.array = np.frombuffer(bytes(raw), kind.dtype()).reshape(shape, order=order)
    return made


def _scalar(kind: _Kind, raw: Any) -> int:
    return int(np.frombuffer(bytes(raw), kind.dtype())[0])


def _encode(text: str, codec: Any) -> bytes:
    # protocol 2 of Python 3 spells bytes as Latin-1 text
    if codec not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"text encoded as {codec!r}")
    return text.encode("latin-1")


_CORES = ("numpy.core", "numpy._core")
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
    **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _frombuffer for core in _CORES},
}


class _Reader(pickle._Unpickler):
    # the one written in Python: its faster twin in C obeys a damaged file that asks for gigabytes of memory

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an array") from None


def read_pickle(content: bytes, where: str) -> Any:
    """Read a pickle of builtin values and NumPy arrays of integers, running nothing.

    Args:
        content: The pickle; strings of Python 2 come out as bytes.
        where: Names the file in error messages.

    Returns:
        The value; arrays are read-only.

    Raises:
        DataError: The pickle is truncated, damaged, or asks for anything else.
    """
    try:
        return _plain(_Reader(io.BytesIO(content), encoding="bytes").load())
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise DataError(
            f"{where}: refused as a pickle ({reason(error)}): expected lists, texts, numbers and "
            "arrays of integers: get the archive anew from its authors"
        ) from None


def _plain(value: Any) -> Any:
    """Stand-ins replaced by the arrays they hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.array if isinstance(value, _Array) else value
