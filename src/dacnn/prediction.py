"""From image files to classes and probabilities."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dacnn.data.fit import read_image
from dacnn.data.folders import image_files
from dacnn.errors import DataError
from dacnn.networks.classifier import Classifier, as_network, evaluating

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """What a network takes an image for.

    Attributes:
        path: The image file.
        classes: Names of the classes, the likeliest first.
        probabilities: Of those classes, in the same order.
    """

    path: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files that some paths name.

    Args:
        paths: Files, taken as they are, and folders, of which all files with an image's ending are taken but hidden ones.

    Returns:
        The files; those of a folder sorted by name, its subfolders included.

    Raises:
        DataError: A path does not exist, or a folder holds no images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = image_files(path)
            if not inside:
                raise DataError(f"{path}: holds no images: expected files such as *.png or *.jpg")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file: expected an image or a folder of images")
    return files


@torch.inference_mode()
def predict(
    network: Classifier,
    paths: str | Path | Sequence[str | Path],
    *,
    top: int = 5,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[Prediction]:
    """Classify image files.

    Args:
        network: The network; left in the mode that it is in, but run in evaluation mode.
        paths: Image files and folders of them, or one, of any size and mode.
        top: How many classes to name for each.
        tick: Called with the images done and to be done.

    Returns:
        A prediction for every image file.

    Raises:
        ConfigError: This is no network.
        DataError: A file is missing or no image.
    """
    files = find_images([paths] if isinstance(paths, str | Path) else paths)
    network = as_network(network)
    classes, device = network.classes, next(network.parameters()).device
    predictions: list[Prediction] = []
    with evaluating(network):
        for start in range(0, len(files), _BATCH):
            batch = files[start : start + _BATCH]
            images_nhwc = torch.from_numpy(np.stack([read_image(file, network.input) for file in batch]))
            likely = network(images_nhwc.to(device)).float().softmax(dim=1).topk(min(top, len(classes)), dim=1)
            for file, probabilities, indices in zip(batch, likely.values.tolist(), likely.indices.tolist(), strict=True):
                predictions.append(Prediction(file, tuple(classes[k] for k in indices), tuple(probabilities)))
            tick(len(predictions), len(files))
    return predictions
