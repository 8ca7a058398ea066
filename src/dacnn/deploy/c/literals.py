"""Values as C writes them: numbers that read back exactly, text that no compiler takes for something else."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dacnn.errors import DeployError

_LINE = 10
# numbers that are words at the same time: whole lines
_PART = 1000 * _LINE


def floats(values: NDArray[np.float32]) -> str:
    """Numbers of an initialiser, which a compiler reads as the same float32 numbers.

    Args:
        values: Any shape; written in the order of memory.

    Returns:
        Lines of nine significant digits each number.

    Raises:
        DeployError: One of them is infinite or no number.
    """
    if not np.isfinite(values).all():
        raise DeployError("a kernel, scale or shift has values that are no numbers: C has no way to write them; train again")
    return _lines(values, _float)


def integers(values: NDArray[np.integer]) -> str:
    """Numbers of an initialiser."""
    return _lines(values, str)


def _float(value: float) -> str:
    word = f"{value:.9g}"
    # an integer has no negative zero
    return "-0.0" if word == "-0" else word


def _lines(values: NDArray[Any], word: Callable[[Any], str]) -> str:
    """Numbers with commas between them, some to a line; in parts, for as words they take twenty times their memory."""
    flat = values.ravel()
    parts = (flat[start : start + _PART].tolist() for start in range(0, flat.size, _PART))
    return ",\n    ".join(_part([word(value) for value in part]) for part in parts)


def _part(words: list[str]) -> str:
    return ",\n    ".join(", ".join(words[start : start + _LINE]) for start in range(0, len(words), _LINE))


def string(text: str) -> str:
    """A string constant: UTF-8, escaped where it is more than letters, digits and spaces."""
    return f'"{_escaped(text)}"'


def comment(text: str) -> str:
    """Text that may stand in a comment."""
    return _escaped(text)


def _escaped(text: str) -> str:
    # three octal digits end by themselves; nothing is left that could end a comment or be a trigraph
    plain = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;()+-_=@%'<>")
    return "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in text.encode("utf-8", "replace"))


def identifier(word: str) -> str:
    """A word of the user's that C takes as the beginning of names.

    Args:
        word: The name.

    Returns:
        The same.

    Raises:
        DeployError: It is none.
    """
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", word, re.ASCII) is None:
        better = re.sub(r"[^A-Za-z0-9_]", "_", word).strip("_")
        better = better if re.match(r"[A-Za-z]", better) else f"net_{better}".rstrip("_")
        raise DeployError(f"'{word}' is no name in C, and the file's name begins all names in it: call the file {better}.c")
    return word


def counted(numbers: int, what: str, unit: str = "numbers") -> int:
    """How many numbers, or bytes, something has.

    Raises:
        DeployError: More than an `int` of C can count.
    """
    if numbers >= 2**31:
        raise DeployError(f"{what} has {numbers:,} {unit}: expected fewer than {2**31:,}, which an int of C counts")
    return numbers
