"""The official archives of CIFAR-10, CIFAR-100 and SVHN, as their authors give them out; no pickle is ever run."""

# N images, H rows, W columns, C channels; CIFAR stores C x H x W, SVHN H x W x C x N

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dacnn.data.fit import Pixels
from dacnn.data.pickles import read_pickle
from dacnn.data.reasons import reason
from dacnn.data.records import Indices, Records, join
from dacnn.errors import DataError

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE
_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Cifar:
    """One of the four forms in which CIFAR is given out.

    Attributes:
        folder: Name of the folder that the archive unpacks to.
        train: Files of the train split.
        test: Files of the test split.
        names: File of the class names.
        label_bytes: Bytes before the pixels of a binary record, the last of them the label; 0 for pickles.
        labels: Key of the labels, and of the class names, in a pickle.
        classes: Number of classes.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int
    labels: tuple[bytes, bytes]
    classes: int


_FIVE = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEN, _FINE = (b"labels", b"label_names"), (b"fine_labels", b"fine_label_names")
FORMS = (
    Cifar("cifar-10-batches-py", _FIVE, ("test_batch",), "batches.meta", 0, _TEN, 10),
    Cifar("cifar-10-batches-bin", tuple(f"{name}.bin" for name in _FIVE), ("test_batch.bin",), "batches.meta.txt", 1, _TEN, 10),
    Cifar("cifar-100-python", ("train",), ("test",), "meta", 0, _FINE, 100),
    Cifar("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 2, _FINE, 100),
)
TARS = (".tar.gz", ".tgz", ".tar")
# what SciPy's reader raises on a damaged file, beside its own MatReadError (an Exception of its own)
_DAMAGED_MAT = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError)
_SVHN = {"train": "train_32x32.mat", "test": "test_32x32.mat"}


def find_archive(path: Path) -> Callable[[], dict[str, Records]] | None:
    """Recognise an official archive by the names of its files.

    Args:
        path: A folder, a `.tar.gz` or a `.mat` file.

    Returns:
        What reads it (split name to records; raises DataError), or None if the path is something else.

    Raises:
        DataError: The path is an archive of another kind, or damaged.
    """
    if path.is_file():
        if path.suffix == ".mat":
            return lambda: _read_svhn(path.parent)
        return _find_in_tar(path) if path.name.endswith(TARS) else None
    if any((path / name).is_file() for name in _SVHN.values()):
        return lambda: _read_svhn(path)
    for form in FORMS:
        for folder in (path, path / form.folder):
            files = {name: folder / name for name in (*form.train, *form.test, form.names) if (folder / name).is_file()}
            if any(name in files for name in (*form.train, *form.test)):
                contents = {name: _read_file(file) for name, file in files.items()}
                return lambda form=form, folder=folder, contents=contents: _read_cifar(form, str(folder), contents)  # type: ignore[misc]
    return None


def _find_in_tar(path: Path) -> Callable[[], dict[str, Records]]:
    """Read the members of a tar by their names alone, so that no path in it is ever followed."""
    try:
        with tarfile.open(path) as tar:
            members = {Path(member.name): member for member in tar if member.isfile()}
            for form in FORMS:
                wanted = (*form.train, *form.test, form.names)
                inside = {name.name: member for name, member in members.items() if name.parent.name == form.folder}
                found = {name: member for name, member in inside.items() if name in wanted}
                if found:
                    contents = {name: file.read() for name, member in found.items() if (file := tar.extractfile(member))}
                    return lambda: _read_cifar(form, f"{path}:{form.folder}", contents)
    except (tarfile.TarError, OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise DataError(f"{path}: damaged or truncated archive ({reason(error)}): get it anew from its authors") from None
    raise DataError(f"{path}: expected an archive that holds one of the folders {', '.join(form.folder for form in FORMS)}")


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from None


def _read_cifar(form: Cifar, folder: str, contents: Mapping[str, bytes]) -> dict[str, Records]:
    needed = (*form.train, *form.test)
    for name in needed:
        if name not in contents:
            raise DataError(f"{folder}/{name}: missing: expected {', '.join(needed)}: unpack the archive anew")
    classes = _class_names(form, folder, contents.get(form.names))
    splits = {}
    for split, names in (("train", form.train), ("test", form.test)):
        read = [_read_batch(form, f"{folder}/{name}", contents[name]) for name in names]
        for name, (images, _) in zip(names, read, strict=True):
            if len(images) != len(read[0][0]):
                raise DataError(
                    f"{folder}/{name}: {len(images)} images, but {names[0]} holds {len(read[0][0])}: "
                    "expected equal batches: the file is truncated, unpack the archive anew"
                )
        store = join([f"{folder}/{name}" for name in names], [images for images, _ in read])
        splits[split] = Records.whole(store, np.concatenate([labels for _, labels in read]), classes)
    return splits


def _class_names(form: Cifar, folder: str, content: bytes | None) -> tuple[str, ...]:
    """The names in the archive, or numbers where it holds none."""
    if content is None:
        return tuple(str(number) for number in range(form.classes))
    where = f"{folder}/{form.names}"
    if form.label_bytes:
        names: Any = content.split()
    else:
        table = read_pickle(content, where)
        names = table.get(form.labels[1], table.get(form.labels[1].decode())) if isinstance(table, dict) else None
    if not isinstance(names, list) or len(names) != form.classes:
        got = len(names) if isinstance(names, list) else "no"
        raise DataError(f"{where}: {got} class names: expected {form.classes}: unpack the archive anew")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)


def _read_batch(form: Cifar, where: str, content: bytes) -> tuple[Pixels, Indices]:
    """Pixels (N, H, W, C) and labels (N,) of one file."""
    if form.label_bytes:
        record = form.label_bytes + _PIXEL_BYTES
        if not content or len(content) % record:
            raise DataError(
                f"{where}: {len(content)} bytes: expected a multiple of {record}, the size of a record: the file is truncated "
                "or of another data set, unpack the archive anew"
            )
        table = np.frombuffer(content, np.uint8).reshape(-1, record)
        images, labels = table[:, form.label_bytes :], table[:, form.label_bytes - 1].astype(np.int64)
    else:
        images, labels = _pickled_batch(read_pickle(content, where), form, where)
    return np.ascontiguousarray(images.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)), labels


def _pickled_batch(batch: Any, form: Cifar, where: str) -> tuple[Pixels, Indices]:
    pairs = batch.items() if isinstance(batch, dict) else ()
    table = {key.encode() if isinstance(key, str) else key: value for key, value in pairs}
    images, labels = table.get(b"data"), table.get(form.labels[0])
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _PIXEL_BYTES:
        got = f"{images.dtype} of shape {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{where}: 'data' is {got}: expected uint8 of shape (N, {_PIXEL_BYTES}): unpack the archive anew")
    key = form.labels[0].decode()
    values = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise DataError(f"{where}: '{key}' is no list of whole numbers: unpack the archive anew")
    if len(values) != len(images) or not values:
        raise DataError(f"{where}: {len(images)} images and {len(values)} {key}: expected as many of both, at least 1")
    if not all(-(2**63) <= value < 2**63 for value in values):
        raise DataError(f"{where}: '{key}' holds {max(values, key=abs)}: expected 0 to {form.classes - 1}")
    return images, np.array(values, np.int64)


def _read_svhn(folder: Path) -> dict[str, Records]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    splits = {}
    for split, name in _SVHN.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing: expected {' and '.join(_SVHN.values())} side by side")
        content = _read_file(path)
        try:
            table = loadmat(io.BytesIO(content), variable_names=["X", "y"])
        except (*_DAMAGED_MAT, MatReadError, ValueError, struct.error, zlib.error) as error:
            raise DataError(
                f"{path}: cannot be read as a MATLAB file ({reason(error)}): get it anew from its authors"
            ) from None
        images, labels = table.get("X"), table.get("y")
        if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[:3] != (_SIDE, _SIDE, 3):
            got = "missing" if images is None else f"{images.dtype} of shape {images.shape}"
            raise DataError(f"{path}: 'X' is {got}: expected uint8 of shape ({_SIDE}, {_SIDE}, 3, N)")
        # MATLAB drops a last axis of length 1
        images = images.reshape(_SIDE, _SIDE, 3, -1)
        if labels is None or labels.dtype.kind not in "iuf" or labels.size != images.shape[3] or not labels.size:
            got = "missing" if labels is None else f"{labels.dtype} of shape {labels.shape}"
            raise DataError(f"{path}: 'y' is {got}: expected one label for each of {images.shape[3]} images")
        numbers = labels.reshape(-1)
        wrong = np.flatnonzero(~np.isin(numbers, np.arange(1, 11)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"{path}, image {row}: label {numbers[row]} is out of range: expected 1 to 10, 10 for the digit 0")
        store = join([str(path)], [np.ascontiguousarray(images.transpose(3, 0, 1, 2))])
        splits[split] = Records.whole(store, numbers.astype(np.int64) % 10, _DIGITS)
    return splits
