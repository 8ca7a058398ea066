"""Arrow tables in the Hugging Face layout: a column of image files, a column of labels, the classes in the metadata."""

import json
from typing import Any

import numpy as np

from dacnn.data.records import ArrowStore, Indices, Parts, Records
from dacnn.errors import DataError

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "fine_label", "labels")


def columns(schema: Any, where: str) -> tuple[str, str]:
    """Find the columns of images and of labels.

    Args:
        schema: A pyarrow.Schema.
        where: Names the table in error messages.

    Returns:
        Name of the image column, name of the label column.

    Raises:
        DataError: One is missing or of another type.
    """
    kinds = {name: feature.get("_type") for name, feature in features(schema).items() if isinstance(feature, dict)}
    image = _choose(schema.names, _IMAGE_NAMES, [name for name, kind in kinds.items() if kind == "Image"])
    label = _choose(schema.names, _LABEL_NAMES, [name for name, kind in kinds.items() if kind == "ClassLabel"])
    for column, what, known in ((image, "images", _IMAGE_NAMES), (label, "labels", _LABEL_NAMES)):
        if column is None:
            raise DataError(f"{where}: no column of {what} among {', '.join(schema.names)}: expected {' or '.join(known)}")
    assert image is not None and label is not None
    return image, label


def _choose(names: list[str], known: tuple[str, ...], declared: list[str]) -> str | None:
    """The usual name, else the only column that is declared as such."""
    usual = [name for name in known if name in names]
    return usual[0] if usual else declared[0] if len(declared) == 1 and declared[0] in names else None


def features(schema: Any) -> dict[str, Any]:
    """What Hugging Face writes about the columns of a pyarrow.Schema; empty where it wrote nothing."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """The names of the classes that the schema declares for the label column, or None."""
    names = (features(schema).get(label) or {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def read_table(table: Any, classes: tuple[str, ...] | None, parts: Parts, *, in_memory: bool) -> Records:
    """Images and labels of a table; no image is opened yet.

    Args:
        table: A pyarrow.Table with a metadata-carrying schema.
        classes: Names of the classes; None: those of the schema, or else what the labels say (numbers, or texts in order).
        parts: The files that the rows come from.
        in_memory: Whether the table is in memory rather than mapped from disk.

    Returns:
        The records.

    Raises:
        DataError: A column is missing or of another type, a label is null or out of range.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    image, label = columns(table.schema, parts.names[0])
    labels, classes = _labels(table[label], classes or class_names(table.schema, label), label, parts)
    column, kind = table[image], table.schema.field(image).type
    paths = None
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        paths = pc.struct_field(column, "path") if kind.get_field_index("path") >= 0 else None
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(f"{parts.names[0]}: column '{image}' is {kind}: expected image files (bytes, or bytes and path)")
    return Records.whole(ArrowStore(column, paths, parts, int(column.nbytes) if in_memory else 0), labels, classes)


def _labels(column: Any, classes: tuple[str, ...] | None, name: str, parts: Parts) -> tuple[Indices, tuple[str, ...]]:
    """Labels as numbers, and the classes."""
    import pyarrow as pa

    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{parts.where(row)}: '{name}' is null: expected a label for every image: fill it in or remove the row")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        texts = column.to_pylist()
        classes = classes or tuple(sorted(set(texts)))
        numbers = {text: number for number, text in enumerate(classes)}
        for row, text in enumerate(texts):
            if text not in numbers:
                raise DataError(f"{parts.where(row)}: label '{text}' is no class: expected one of {', '.join(classes[:10])}")
        return np.array([numbers[text] for text in texts], np.int64), classes
    if not pa.types.is_integer(column.type):
        raise DataError(f"{parts.names[0]}: column '{name}' is {column.type}: expected whole numbers or texts")
    labels = np.array(column.to_numpy(), np.int64)
    return labels, classes or tuple(str(number) for number in range(int(labels.max(initial=-1)) + 1))
