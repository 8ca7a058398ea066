"""Parquet files in the Hugging Face layout: read into memory as they are, or mapped from disk where they are large."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dacnn.data.folders import SPLIT_WORDS
from dacnn.data.hub import quiet_datasets
from dacnn.data.reasons import reason
from dacnn.data.records import Parts, Records
from dacnn.data.tables import columns, read_table
from dacnn.errors import DataError

_WORDS = re.compile(r"[^a-z]+")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def read_parquet(path: Path, files: Sequence[Path], memory_bytes: float) -> dict[str, Records]:
    """Read the splits of a data set; no image is decoded yet.

    Args:
        path: The file or folder that was asked for.
        files: All Parquet files in it; each one's split is the word (train, validation, test) in its name or folder.
        memory_bytes: Files up to this size are held in memory, undecoded; larger ones are mapped
            from the cache of Hugging Face `datasets`, which keeps a copy.

    Returns:
        Split name to records; only `train` where no file names a split.

    Raises:
        DataError: A file is damaged, a shard or the train split is missing, or a column is.
    """
    splits: dict[str, list[Path]] = {}
    for file in sorted(files):
        splits.setdefault(_split_of(file, path), []).append(file)
    _check_one_subset(path, files)
    if "train" not in splits:
        raise DataError(f"{path}: holds {', '.join(splits)}, but no train split: expected a file such as train.parquet")
    for found in splits.values():
        _check_shards(found)
    in_memory = sum(file.stat().st_size for file in files) <= memory_bytes
    records = {"train": _read_split(splits["train"], None, in_memory)}
    for split in splits.keys() - {"train"}:
        records[split] = _read_split(splits[split], records["train"].classes, in_memory)
    return records


def _split_of(file: Path, root: Path) -> str:
    """The split that a file belongs to; `train` if no word says so."""
    names = file.relative_to(root).parts if file != root else (file.name,)
    for name in reversed(names):
        for word in _WORDS.split(name.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return "train"


def _check_one_subset(path: Path, files: Sequence[Path]) -> None:
    folders = {file.parent.parent if file.parent.name.lower() in SPLIT_WORDS else file.parent for file in files}
    if len(folders) > 1:
        raise DataError(
            f"{path}: holds {len(folders)} sets of Parquet files: give one of {', '.join(map(str, sorted(folders)))}"
        )


def _check_shards(files: Sequence[Path]) -> None:
    shards = [(int(found[1]), int(found[2]), file) for file in files if (found := _SHARD.search(file.name))]
    for _, total, file in shards:
        missing = set(range(total)) - {number for number, of, _ in shards if of == total}
        if missing:
            raise DataError(
                f"{file.parent}: part {min(missing):05d} of {total} is missing, though {file.name} counts it: "
                "copy all parts of the data set"
            )


def _read_split(files: Sequence[Path], classes: tuple[str, ...] | None, in_memory: bool) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, counts = [], []
    chosen: tuple[str, str] | None = None
    for file in files:
        try:
            opened = pq.ParquetFile(file)
            chosen = chosen or columns(opened.schema_arrow, str(file))
            missing = [column for column in chosen if column not in opened.schema_arrow.names]
            if missing:
                raise DataError(f"{file}: no column '{missing[0]}', though {files[0].name} has it")
            counts.append(opened.metadata.num_rows)
            if in_memory:
                tables.append(opened.read(columns=list(chosen)))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: cannot be read as Parquet ({reason(error)}): copy the file anew") from None
    try:
        # the first file's word on the columns holds for all
        table = pa.concat_tables([table.cast(tables[0].schema) for table in tables]) if in_memory else _mapped(files, chosen)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{files[0].parent}: the files of one split do not fit together ({reason(error)})") from None
    return read_table(table, classes, Parts(tuple(map(str, files)), tuple(counts)), in_memory=in_memory)


def _mapped(files: Sequence[Path], chosen: tuple[str, str] | None) -> Any:
    """The columns of the files as a table mapped from the cache of `datasets`: Parquet itself has no cheap random access."""
    import datasets

    with quiet_datasets():
        try:
            data_set: Any = datasets.Dataset.from_parquet(list(map(str, files)), columns=list(chosen or ()))
        except (datasets.exceptions.DatasetsError, OSError) as error:
            raise DataError(
                f"{files[0].parent}: cannot be mapped from disk ({reason(error)}): raise data.memory_gigabytes"
            ) from None
    return data_set.data.table.replace_schema_metadata(data_set.features.arrow_schema.metadata)
