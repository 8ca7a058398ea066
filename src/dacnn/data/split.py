"""Images set aside, the same ones every time: a share of every class."""

import numpy as np

from dacnn.data.records import Indices
from dacnn.errors import DataError


def hold_out(labels: Indices, share: float, seed: int, remedy: str) -> tuple[Indices, Indices]:
    """Split a set, every class in proportion; a class always keeps at least one image.

    Args:
        labels: Class of each image, int64, shape (N,).
        share: Share of the images to set aside, from 0 (none) to below 1; above 0, at least one image is set aside.
        seed: Seed of the draw.
        remedy: What to do if nothing can be set aside.

    Returns:
        Indices that are kept and indices that are set aside, each ascending.

    Raises:
        DataError: No class has two images.
    """
    counts = np.bincount(labels)
    wanted = max(1, round(share * len(labels))) if share > 0 else 0
    # largest remainder: whole images per class that add up to the share of all, for classes of any size
    taken = np.floor(share * counts).astype(np.int64)
    for label in np.argsort(taken - share * counts, kind="stable"):
        if taken.sum() < wanted:
            taken[label] += 1
    taken = np.minimum(taken, np.maximum(counts - 1, 0))
    if taken.sum() == 0 and wanted:
        spare = np.flatnonzero(counts >= 2)
        if not len(spare):
            raise DataError(f"{len(labels)} images, one of each class: none can be set aside: {remedy}")
        taken[spare[0]] = 1
    # RandomState, whose draws NumPy has promised never to change: results stay comparable over the years
    random = np.random.RandomState(seed)
    aside = np.zeros(len(labels), bool)
    for label in range(len(counts)):
        aside[random.permutation(np.flatnonzero(labels == label))[: taken[label]]] = True
    return np.flatnonzero(~aside), np.flatnonzero(aside)
