"""From the name of a data set to its images, split and fitted: one reader for all sources."""

import difflib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dacnn.config import DataConfig
from dacnn.data.archives import find_archive
from dacnn.data.fit import Pixels
from dacnn.data.folders import files_in, read_image_folder
from dacnn.data.hub import read_hub
from dacnn.data.imageset import ImageSet, Progress, load_records
from dacnn.data.parquet import read_parquet
from dacnn.data.prepare import choose_input, measured
from dacnn.data.reasons import reason
from dacnn.data.records import Records, join
from dacnn.data.split import hold_out
from dacnn.errors import DataError, UnknownNameError
from dacnn.networks.plan import Input, to_plain

# fixed and independent of the training's seed, so that every run is measured on the same images
_TEST_SEED, _VALIDATION_SEED = 0, 1
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


@dataclass(frozen=True)
class Splits:
    """A data set, ready to train on.

    Attributes:
        train: Images to learn from.
        validation: Images to choose the best epoch by; empty if `data.validation` is 0.
        test: Images that nothing is chosen by.
        input: What the images were brought to, with the statistics of the train images.
        classes: Names of the classes.
        name: The source.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    input: Input
    classes: tuple[str, ...]
    name: str

    def identity(self) -> dict[str, Any]:
        """What tells these images from others, as plain values; pixels by the statistics of the train images."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "classes": list(self.classes),
            "input": to_plain(self.input),
            "images": {name: len(part) for name, part in parts.items()},
            "labels": {name: hashlib.sha256(part.labels.cpu().numpy().tobytes()).hexdigest() for name, part in parts.items()},
        }


def load_data(config: DataConfig, progress: Progress | None = None) -> Splits:
    """Read a data set: find it, check it, split it, decode it once if it fits in memory.

    The test split is the source's own (its validation split where it has no test split), else a share of every class.
    The validation split is always a share of every class of train. Both draws are fixed.

    Args:
        config: Source, size, fit, channels, shares, memory.
        progress: Called while images are decoded, with a description, the images done and all images.

    Returns:
        The splits.

    Raises:
        DataError: The source cannot be found or read, or is not what it is said to be.
        UnknownNameError: The source is no path, no hub data set and none of the known names.
    """
    found, test = _train_and_test(config)
    share = config.validation
    kept, aside = hold_out(found.labels, share, _VALIDATION_SEED, "set data.validation to 0")
    train, validation = found.select(kept), found.select(aside)
    input = choose_input(train, config, config.source)
    in_memory = _fits(len(train) + len(validation) + len(test), input, config)

    def load(records: Records, split: str) -> ImageSet:
        return load_records(records, input, in_memory=in_memory, name=f"decoding {split}", progress=progress)

    images = load(train, "train")
    return Splits(
        train=images,
        validation=load(validation, "validation"),
        test=load(test, "test"),
        input=measured(input, images),
        classes=train.classes,
        name=config.source,
    )


def load_test(config: DataConfig, input: Input, classes: tuple[str, ...], progress: Progress | None = None) -> ImageSet:
    """Read the test images of a data set for a network that exists: they are brought to its input.

    Args:
        config: The source; its size, channels and fit are passed over.
        input: What the network takes.
        classes: The network's classes.
        progress: Called while images are decoded, with a description, the images done and all images.

    Returns:
        The test images; where the data set numbers the same classes otherwise, labelled as the network does.

    Raises:
        DataError: The source cannot be read, or has another number of classes.
        UnknownNameError: The source is no path, no hub data set and none of the known names.
    """
    _, test = _train_and_test(config)
    if len(test.classes) != len(classes):
        raise DataError(
            f"{config.source} has {len(test.classes)} classes ({_some(test.classes)}), "
            f"the network {len(classes)} ({_some(classes)}): evaluate it on a data set of its own classes"
        )
    if test.classes != classes and set(test.classes) == set(classes):
        number = np.array([classes.index(name) for name in test.classes], np.int64)
        test = test.relabelled(number[test.labels], classes)
    in_memory = _fits(len(test), input, config)
    return load_records(test, input, in_memory=in_memory, name="decoding test", progress=progress)


def load_train(config: DataConfig, input: Input, count: int, progress: Progress | None = None) -> ImageSet:
    """Read some of the train images of a data set, spread over it, for a network that exists.

    Args:
        config: The source; its size, channels and fit are passed over.
        input: What the network takes.
        count: How many at most.
        progress: Called while images are decoded.

    Returns:
        The images.

    Raises:
        DataError: The source cannot be read.
        UnknownNameError: The source is no path, no hub data set and none of the known names.
    """
    train, _ = _train_and_test(config)
    chosen = np.linspace(0, len(train) - 1, min(count, len(train))).round().astype(np.int64)
    return load_records(train.select(chosen), input, in_memory=True, name="decoding train", progress=progress)


def _fits(images: int, input: Input, config: DataConfig) -> bool:
    """Whether so many decoded images may be kept in memory."""
    return images * input.height * input.width * input.channels <= config.memory_gigabytes * 1e9


def _train_and_test(config: DataConfig) -> tuple[Records, Records]:
    """The train images (validation not yet set aside) and the test images, checked."""
    splits = find_source(config)
    train = splits["train"]
    _check_train(train, config.source)
    test = splits.get("test", splits.get("validation"))
    if test is None:
        kept, aside = hold_out(train.labels, config.held_out, _TEST_SEED, "add images or a test split")
        train, test = train.select(kept), train.select(aside)
    if not len(test):
        raise DataError(f"{config.source}: the test split has no images: expected 1 or more")
    return train, test


def _check_train(train: Records, source: str) -> None:
    """Raise unless there are two classes or more, each with a train image."""
    if not len(train):
        raise DataError(f"{source}: no train images: expected at least one per class")
    if len(train.classes) < 2:
        raise DataError(f"{source}: one class ('{train.classes[0]}'): expected 2 or more")
    missing = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if len(missing):
        names = _some([train.classes[label] for label in missing])
        raise DataError(f"{source}: no train image of {len(missing)} of {len(train.classes)} classes ({names}): add some")


def find_source(config: DataConfig) -> dict[str, Records]:
    """Find a data set by name or path; its images are listed, not yet decoded.

    Args:
        config: The source, and the memory that undecoded images may take.

    Returns:
        Split name (`train`, `validation`, `test`) to records.

    Raises:
        DataError: The source cannot be found or read.
        UnknownNameError: The source is no path, no hub data set and none of the known names.
    """
    source = config.source
    if source in SOURCES:
        return SOURCES[source]()
    try:
        path = Path(source).expanduser()
        if source.strip() and path.exists():
            return _read_path(path, config.memory_gigabytes * 1e9)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{source!r}: cannot be opened ({reason(error)}): expected a folder, an archive or a data set"
        ) from None
    hub = _HUB_NAME.fullmatch(source)
    if hub and not source.startswith((".", "~")):
        return read_hub(hub[1], hub[2])
    if re.fullmatch(r"[\w-]+", source) and difflib.get_close_matches(source, SOURCES):
        raise UnknownNameError("data set", source, SOURCES)
    raise DataError(
        f"'{source}': there is no such file or folder here, and no data set is named so: expected a path, a hub data set, or "
        f"one of {', '.join(SOURCES)}"
    )


def _read_path(path: Path, memory_bytes: float) -> dict[str, Records]:
    archive = find_archive(path)
    if archive:
        return archive()
    if path.is_file():
        if path.suffix != ".parquet":
            raise DataError(f"{path}: expected a folder, a .tar.gz of CIFAR, a .mat of SVHN or a .parquet file")
        return read_parquet(path, [path], memory_bytes)
    files = files_in(path, {".parquet"})
    return read_parquet(path, files, memory_bytes) if files else read_image_folder(path)


def _digits() -> dict[str, Records]:
    """1,797 handwritten digits of 8 x 8 pixels, part of scikit-learn; no download."""
    from sklearn.datasets import load_digits

    table = load_digits()
    images: Pixels = np.round(table.images * (255 / 16)).astype(np.uint8)[..., None]
    return {
        "train": Records.whole(join(["digits"], [images]), table.target.astype(np.int64), tuple(map(str, table.target_names)))
    }


SOURCES: dict[str, Callable[[], dict[str, Records]]] = {
    "digits": _digits,
    "cifar10": lambda: read_hub("uoft-cs/cifar10"),
    "cifar100": lambda: read_hub("uoft-cs/cifar100"),
    "svhn": lambda: read_hub("ufldl-stanford/svhn", "cropped_digits"),
}


def _some(names: tuple[str, ...] | list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
