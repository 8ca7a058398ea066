"""A folder of images by class: one folder per class, either at once or below `train` and `test`."""

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from dacnn.data.reasons import reason
from dacnn.data.records import FileStore, Records
from dacnn.errors import DataError

# what people call a split, and what it is
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def read_image_folder(folder: Path) -> dict[str, Records]:
    """List the images of a folder; none is opened yet.

    Files whose name does not end like an image's (notes, thumbnails' data bases) and hidden ones are passed over.

    Args:
        folder: `folder/CLASS/*` or `folder/SPLIT/CLASS/*`, SPLIT being train, validation (valid, val, dev) or test;
            classes are numbered in the order of their names.

    Returns:
        Split name (`train`, `validation`, `test`) to records; only `train` where there are no splits.

    Raises:
        DataError: There are no class folders, no train split, a class without images, or a class that train lacks.
    """
    folders = _subfolders(folder)
    named: dict[str, Path] = {}
    for sub in folders:
        split = SPLIT_WORDS.get(sub.name.lower())
        if split and split in named:
            raise DataError(f"{folder}: both '{named[split].name}' and '{sub.name}' are the {split} split: keep one")
        if split:
            named[split] = sub
    if not named:
        return {"train": _read_split(folder, None)}
    if "train" not in named:
        raise DataError(f"{folder}: holds {', '.join(sub.name for sub in named.values())}, but no folder 'train': expected one")
    train = _read_split(named["train"], None)
    return {"train": train} | {split: _read_split(sub, train.classes) for split, sub in named.items() if split != "train"}


def _read_split(folder: Path, classes: tuple[str, ...] | None) -> Records:
    """The images of one split; `classes` are those of train, or None for train itself."""
    folders = _subfolders(folder)
    if not folders:
        raise DataError(f"{folder}: holds no folders: expected one folder of images per class")
    names = classes or tuple(sub.name for sub in folders)
    paths: list[Path] = []
    labels: list[int] = []
    for sub in folders:
        if sub.name not in names:
            raise DataError(f"{sub}: class '{sub.name}' is not in train: expected one of {', '.join(names[:10])}")
        found = image_files(sub)
        if not found and classes is None:
            raise DataError(f"{sub}: class '{sub.name}' has no image: add some (.png, .jpg, ...) or remove the folder")
        paths += found
        labels += [names.index(sub.name)] * len(found)
    return Records.whole(FileStore(tuple(paths)), np.array(labels, np.int64), names)


def image_files(folder: Path) -> list[Path]:
    """What a folder and its subfolders hold of files whose names end like an image's.

    Args:
        folder: The folder.

    Returns:
        The files, sorted by name; hidden ones, and those in hidden folders such as `.ipynb_checkpoints`, are passed over.

    Raises:
        DataError: A folder cannot be listed.
    """
    return files_in(folder, {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN})


def files_in(folder: Path, endings: Collection[str]) -> list[Path]:
    """What a folder and its subfolders hold, links to folders followed.

    Args:
        folder: The folder.
        endings: What names end in, such as `.png`, in whatever case.

    Returns:
        The files, sorted by name, but for hidden ones and those in hidden folders; each folder once, whatever leads there, and
        none that `folder` itself lies in.

    Raises:
        DataError: A folder cannot be listed.
    """

    def refused(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({reason(error)}): make it readable, or move it away")

    found = []
    # a link to where this folder lies leads back here, past what is none of it
    top = Path(os.path.realpath(folder))
    seen = set(top.parents)
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refused):
        real = Path(os.path.realpath(place))
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        found += [Path(place, name) for name in names if os.path.splitext(name)[1].lower() in endings and not is_hidden(name)]
    return sorted(path for path in found if path.is_file())


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not is_hidden(sub.name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({reason(error)})") from None


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's: hidden, or left by an archiver or a file system."""
    return name.startswith((".", "__MACOSX")) or name == "lost+found"
