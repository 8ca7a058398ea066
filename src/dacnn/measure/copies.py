"""Which arrays are copies of one kernel, also where channels were scaled, reordered, blocked or rounded.

A kernel is read as rows, one channel each. Scaling channels, as folding batch norm does, leaves the direction of every row as
it was, so two arrays are copies if all their rows point the same way: different kernels never do, since every further number
of a row would have to agree by chance.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from dacnn.measure.layouts import Rows, readings
from dacnn.measure.stored import StoredArray, is_trivial

# R rows, K columns

# Largest error of one number, relative and absolute, when a kernel is rounded to a type after it was scaled. float32 is left
# room for a dozen scalings in turn; the absolute errors of narrow floats are those of their subnormal numbers.
_ERRORS = {
    "float64": (1e-5, 0.0),
    "float32": (1e-5, 0.0),
    "float16": (2e-3, 1e-7),
    "bfloat16": (1e-2, 0.0),
    "float8_e4m3fn": (0.1, 2e-3),
    "float8_e5m2": (0.2, 2e-5),
}
# integers are rounded by one half at most; the other half is for a scale that is known only as well as they are
_ERRORS_OF_INTEGERS = (0.0, 1.0)
# A row of which its type leaves so little is not compared.
_COARSEST = 0.25
# Numbers that have to agree, beyond the one of each row that the scale takes, before two kernels are called copies.
_ENOUGH_AGREEMENT = 48
# Rows whose projections are compared before whole kernels are: early ones, since padding stands at the end.
_PROBES = np.array([0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377], np.int64)


@dataclass(frozen=True)
class Difference:
    """How one array differs from the kernel that it is a copy of.

    Attributes:
        words: `exact`, or what was done to it: `scaled per output channel`, `scaled by one factor`, `transposed`,
            `blocked by 16`, `channels last`, `rounded to int8`, ...
        layout: The layout in which it was recognised, as in `Rows.layout`.
        kernel_layout: The same of the kernel.
    """

    words: tuple[str, ...] = ("exact",)
    layout: str = ""
    kernel_layout: str = ""


@dataclass(frozen=True)
class Group:
    """Arrays that hold one kernel, by their indices.

    Attributes:
        first: The one that the others are compared with.
        others: The others and how they differ.
    """

    first: int
    others: tuple[tuple[int, Difference], ...]


@dataclass(frozen=True, eq=False)
class _Candidate:
    """One reading of one array, with the projections of its first rows."""

    owner: int
    rows: Rows
    probes: NDArray[np.float64]
    tolerance: NDArray[np.float64]


def precision_of(array: StoredArray) -> str:
    """The type that the numbers of an array were rounded to, which may be narrower than the type they are stored in."""
    values = array.values
    if values.dtype != np.float32 or array.dtype != "float32":
        return array.dtype
    if not np.any(np.ascontiguousarray(values).view(np.uint32) & 0xFFFF):
        return "bfloat16"
    with np.errstate(over="ignore"):
        return "float16" if np.array_equal(values.astype(np.float16).astype(np.float32), values) else "float32"


def _errors(matrix: NDArray[np.float64], precision: str) -> NDArray[np.float64]:
    """Largest error of each number of a matrix, shape (R, K)."""
    relative, absolute = _ERRORS.get(precision, _ERRORS_OF_INTEGERS)
    errors: NDArray[np.float64] = relative * np.abs(matrix) + absolute
    return errors


def _tolerance(matrix: NDArray[np.float64], precision: str) -> NDArray[np.float64]:
    """How far the direction of each row may have turned by rounding, shape (R,); infinite for rows of zeros."""
    norms = np.linalg.norm(matrix, axis=1)
    turned = np.linalg.norm(_errors(matrix, precision), axis=1)
    tolerance = np.full(len(matrix), np.inf)
    np.divide(turned, norms, out=tolerance, where=norms > 0)
    return tolerance


def _candidate(owner: int, rows: Rows, precision: str) -> _Candidate:
    probes = np.full((len(_PROBES), 2), np.nan)
    indices = _PROBES[rows.rows > _PROBES]
    matrix = rows.take(indices)
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    directions = np.random.default_rng(rows.columns).standard_normal((rows.columns, 2))
    tolerance = np.full(len(_PROBES), np.inf)
    tolerance[: len(indices)] = _tolerance(matrix, precision)
    with np.errstate(divide="ignore", invalid="ignore"):
        probes[: len(indices)] = np.abs(matrix @ directions) / norms
    probes[tolerance > _COARSEST] = np.nan
    return _Candidate(owner, rows, probes, tolerance)


def _agreement(rows: NDArray[np.float64], allowed: NDArray[np.float64]) -> int:
    """How many numbers would have to agree by chance if these rows agree with others, both of shape (R, K)."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    projection = np.abs(units @ np.random.default_rng(0).standard_normal(rows.shape[1]))
    # a row of one value says nothing, and rows that repeat, as those of a blur do, say nothing new
    projection[np.ptp(units, axis=1) <= 1e-6] = 0
    values, distinct = np.unique(projection.round(5), return_index=True)
    # neither does a number that drowns in its error
    counts = np.count_nonzero(np.abs(rows) > 4 * allowed, axis=1)[distinct] - 1
    return int(counts[(values > 0) & (counts > 0)].sum())


def _scaled(scales: NDArray[np.float64], tolerance: float, axis: str) -> list[str]:
    if np.all(np.abs(scales - 1) <= tolerance):
        return []
    if np.ptp(scales) <= tolerance * np.abs(scales).max():
        return ["scaled by one factor"]
    return [f"scaled per {axis} channel"]


def _layout_words(one: Rows, other: Rows) -> list[str]:
    words = ["transposed"] if one.axis != other.axis else []
    if one.layout != other.layout:
        words.append(other.layout or f"not {one.layout}")
    return words


def _compare(one: Rows, other: Rows, precisions: tuple[str, str]) -> Difference | None:
    """How `other` differs from `one`; None where it is another kernel."""
    indices = np.arange(min(one.rows, other.rows))
    first, second = one.take(indices), other.take(indices)
    if one.rows == other.rows and np.array_equal(first, second):
        words = _layout_words(one, other) or ["exact"]
        enough = _agreement(first[first.any(axis=1)], np.zeros(())) >= _ENOUGH_AGREEMENT
        return Difference(tuple(words), other.layout, one.layout) if enough else None
    valid = (_tolerance(first, precisions[0]) <= _COARSEST) & (_tolerance(second, precisions[1]) <= _COARSEST)
    if 2 * np.count_nonzero(valid) < max(one.rows, other.rows):
        return None
    silenced = first.any(axis=1) & ~second.any(axis=1)
    first, second = first[valid], second[valid]
    # the scale of each row that brings the second one nearest to the first
    scales = (np.einsum("rk,rk->r", first, second) / np.einsum("rk,rk->r", second, second))[:, None]
    allowed = _errors(first, precisions[0]) + np.abs(scales) * _errors(second, precisions[1])
    differs = np.abs(first - scales * second) > allowed
    if differs.any() or not scales.all() or _agreement(first, allowed) < _ENOUGH_AGREEMENT:
        return None
    tolerance = float((np.linalg.norm(allowed, axis=1) / np.linalg.norm(first, axis=1)).max())
    factors = np.append(1 / scales[:, 0], np.zeros(np.count_nonzero(silenced)))
    words = _scaled(factors, tolerance, one.axis) + _layout_words(one, other)
    narrow = [name for name in precisions if name not in {"float32", "float64"}]
    # a power of two is as exact in a narrow type as in a wide one
    if narrow and np.abs(first - scales * second).max() > 1e-6 * np.abs(first).max():
        words.append(f"rounded to {narrow[-1]}")
    return Difference(tuple(words) or ("last bits differ",), other.layout, one.layout)


def difference_between(kernel: StoredArray, array: StoredArray) -> Difference | None:
    """How an array of the same shape and the usual order differs from a kernel.

    Args:
        kernel: The kernel.
        array: The array.

    Returns:
        What was done to it; None where it is no copy.
    """
    if not (_comparable(kernel) and _comparable(array)):
        return None
    precisions = precision_of(kernel), precision_of(array)
    # rows are output channels, then input channels
    for one, other in zip(*(islice(readings(each.values), 2) for each in (kernel, array)), strict=True):
        if one.columns == other.columns and (difference := _compare(one, other, precisions)) is not None:
            return difference
    return None


def _same_bytes(arrays: Sequence[StoredArray]) -> dict[int, list[int]]:
    """Index of the first of equal arrays -> indices of the others."""
    firsts: dict[tuple[str, bytes], int] = {}
    others: dict[int, list[int]] = {}
    for index, array in enumerate(arrays):
        digest = hashlib.blake2b(np.ascontiguousarray(array.values).data, digest_size=16).digest()
        first = firsts.setdefault((array.dtype, digest), index)
        others.setdefault(first, [])
        if first != index:
            others[first].append(index)
    return others


def _comparable(array: StoredArray) -> bool:
    return array.values.dtype.kind in "fi" and bool(np.isfinite(array.values).all()) and not is_trivial(array.values)


class _Bucket:
    """Candidates with rows of one length, and their probes in one array that grows."""

    def __init__(self) -> None:
        self.candidates: list[_Candidate] = []
        self.probes = np.empty((16, len(_PROBES), 2))
        self.tolerances = np.empty((16, len(_PROBES), 1))

    def add(self, candidate: _Candidate) -> None:
        count = len(self.candidates)
        if count == len(self.probes):
            self.probes = np.concatenate([self.probes, np.empty_like(self.probes)])
            self.tolerances = np.concatenate([self.tolerances, np.empty_like(self.tolerances)])
        self.probes[count], self.tolerances[count, :, 0] = candidate.probes, candidate.tolerance
        self.candidates.append(candidate)

    def alike(self, candidate: _Candidate) -> list[_Candidate]:
        """Those whose first rows point the same way as far as two projections tell."""
        left = np.arange(len(self.candidates))
        # the first rows rule most of them out
        for rows in (slice(0, 2), slice(2, None)):
            allowed = 8 * (self.tolerances[left, rows] + candidate.tolerance[rows, None]) + 1e-6
            # a comparison with NaN is false, so a row of zeros agrees with everything
            with np.errstate(invalid="ignore"):
                differs = np.abs(self.probes[left, rows] - candidate.probes[rows]) > allowed
            left = left[~differs.any(axis=(1, 2))]
        return [self.candidates[index] for index in left]


def group_copies(arrays: Sequence[StoredArray], references: int = 0) -> list[Group]:
    """Find which arrays hold the same kernel.

    Args:
        arrays: The arrays.
        references: How many of the first ones are to be compared with, rather than found to be copies of a later one.

    Returns:
        One group for each kernel, in the order of the arrays.
    """
    same = {
        first: others if others and not is_trivial(arrays[first].values) else []
        for first, others in _same_bytes(arrays).items()
    }
    alone = [index for index, array in enumerate(arrays) if is_trivial(array.values)]
    precisions = {index: precision_of(arrays[index]) for index in same if _comparable(arrays[index])}
    # a kernel with rows of zeros is compared with a full one, rather than the other way round
    order = sorted(precisions, key=lambda index: (index >= references, np.count_nonzero(arrays[index].values == 0)))
    firsts: dict[int, _Bucket] = defaultdict(_Bucket)
    found: dict[int, list[tuple[int, Difference]]] = {index: [] for index in {*same, *alone}}
    for index in order:
        own = [_candidate(index, rows, precisions[index]) for rows in readings(arrays[index].values, arrays[index].blocked)]
        match = _first_match(own, firsts, precisions)
        if match is None:
            for candidate in own:
                firsts[candidate.rows.columns].add(candidate)
        else:
            owner, difference = match
            found[owner].append((index, difference))
            found[owner] += [(equal, difference) for equal in same[index]]
            del found[index]
    for first in found:
        found[first] += [(equal, Difference()) for equal in same.get(first, [])]
    return [Group(first, tuple(sorted(others, key=lambda pair: pair[0]))) for first, others in sorted(found.items())]


def _first_match(
    own: Iterable[_Candidate], firsts: dict[int, _Bucket], precisions: dict[int, str]
) -> tuple[int, Difference] | None:
    """The earlier array that one array, in any reading, is a copy of; the simplest explanation where there are several."""
    matches: list[tuple[int, int, Difference]] = []
    for candidate in own:
        for other in firsts[candidate.rows.columns].alike(candidate):
            difference = _compare(other.rows, candidate.rows, (precisions[other.owner], precisions[candidate.owner]))
            if difference is not None:
                # the kernel is likelier to lie as usual than its copy
                unusual = bool(difference.layout) + 2 * bool(difference.kernel_layout)
                cost = (difference.words != ("exact",)) + len(difference.words) + unusual
                matches.append((cost, other.owner, difference))
        if matches and min(cost for cost, _, _ in matches) <= 2:
            break
    if not matches:
        return None
    _, owner, difference = min(matches, key=lambda match: match[0])
    return owner, difference
