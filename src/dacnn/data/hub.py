"""Data sets of the Hugging Face hub, through `datasets`; no code of a data set is ever run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dacnn.data.folders import SPLIT_WORDS
from dacnn.data.reasons import reason
from dacnn.data.records import Parts, Records
from dacnn.data.tables import read_table
from dacnn.errors import DataError


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the progress bars and warnings of `datasets` and the hub, and bring them back afterwards."""
    import datasets
    from huggingface_hub import utils

    bars = (datasets, utils)
    shown = [module for module in bars if not module.are_progress_bars_disabled()]
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for module in shown:
        module.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_hub(name: str, configuration: str | None = None) -> dict[str, Records]:
    """Download a data set, or find it in the cache of `datasets`; no image is decoded yet.

    Args:
        name: `owner/name` on the hub.
        configuration: The subset, where the data set has several.

    Returns:
        Split name (`train`, `validation`, `test`) to records; the images stay on disk. Other splits are left out.

    Raises:
        DataError: The hub cannot be reached, has no such data set, or the data set holds no labelled images.
    """
    import datasets
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client the hub uses

    with quiet_datasets():
        try:
            loaded: Any = datasets.load_dataset(name, configuration)
        except datasets.exceptions.DatasetNotFoundError:
            raise DataError(f"'{name}' is neither a local path nor a public data set on the hub: check the name") from None
        except (HTTPError, OSError) as error:
            raise DataError(
                f"'{name}' cannot be read from the hub ({reason(error)}): connect to the network, "
                "or give a local folder or archive of it as data.source"
            ) from None
        except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
            raise DataError(
                f"'{name}' on the hub cannot be read ({reason(error)}): give a local folder of it as data.source"
            ) from None
    splits = {SPLIT_WORDS[split.lower()]: loaded[split] for split in loaded if split.lower() in SPLIT_WORDS}
    if "train" not in splits:
        raise DataError(f"'{name}' on the hub has the splits {', '.join(loaded)}: expected one named train")
    records = {"train": _records(splits["train"], name, "train", None)}
    for split in splits.keys() - {"train"}:
        records[split] = _records(splits[split], name, split, records["train"].classes)
    return records


def _records(data_set: Any, name: str, split: str, classes: tuple[str, ...] | None) -> Records:
    table = data_set.data.table.replace_schema_metadata(data_set.features.arrow_schema.metadata)
    return read_table(table, classes, Parts((f"{name} ({split})",), (len(table),)), in_memory=False)
