"""Images on disk get classes and probabilities."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dacnn
from dacnn.errors import DataError
from dacnn.prediction import find_images, predict


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "inner").mkdir()
    for name, shape in {
        "b.png": (32, 32, 3),
        "a.jpg": (40, 64, 3),
        "inner/grey.png": (50, 32),
        "inner/c.webp": (8, 8, 4),
    }.items():
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    # what systems leave behind, and an ending that images are only written with
    (tmp_path / ".thumbnails").mkdir()
    for name in (".thumbnails/b.png", "._b.png", "page.pdf"):
        (tmp_path / name).write_bytes(b"no image")
    return tmp_path


def test_a_folder_gives_its_images_sorted_and_a_file_itself(folder: Path) -> None:
    found = find_images([folder, folder / "b.png"])
    assert [file.relative_to(folder).as_posix() for file in found] == [
        "a.jpg",
        "b.png",
        "inner/c.webp",
        "inner/grey.png",
        "b.png",
    ]


def test_predictions_are_the_softmax_of_the_logits(folder: Path) -> None:
    network = dacnn.create("dacnn3", width=8, num_classes=4, seed=0).eval()
    pixels = torch.from_numpy(np.asarray(Image.open(folder / "b.png")).copy())[None]
    with torch.no_grad():
        expected = network(pixels).softmax(1)[0]
    (prediction,) = predict(network, [folder / "b.png"], top=9)
    assert prediction.classes[0] == str(int(expected.argmax()))
    assert prediction.probabilities == pytest.approx(sorted(expected.tolist(), reverse=True), rel=1e-5)
    assert len(predict(network, [folder], top=2)) == 4
    assert all(len(prediction.classes) == 2 for prediction in predict(network, [folder], top=2))


def test_what_is_no_image_is_named(folder: Path) -> None:
    network = dacnn.create("dacnn3", width=8, seed=0).eval()
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"broken\.png"):
        predict(network, [folder])
    with pytest.raises(DataError, match=r"nothing\.png: no such file"):
        predict(network, [folder / "nothing.png"])
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no images"):
        predict(network, [empty])
