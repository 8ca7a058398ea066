"""Data sets from their name or path to splits: digits, image folders, Parquet, and what is wrong with them."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dacnn.config import DataConfig
from dacnn.data import hub
from dacnn.data.folders import read_image_folder
from dacnn.data.imageset import MemoryImages, StreamedImages
from dacnn.data.sources import load_data, load_test
from dacnn.data.split import hold_out
from dacnn.errors import DataError, UnknownNameError
from dacnn.networks.plan import Input


def load(path, **changes):
    return load_data(DataConfig(source=str(path), **changes))


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig())


def test_digits_are_split_by_class_and_always_alike(digits):
    assert digits.classes == tuple("0123456789")
    assert len(digits.test) == round(0.2 * 1797)
    assert len(digits.train) + len(digits.validation) + len(digits.test) == 1797
    assert digits.input.channels == 1
    for part, share in ((digits.test, 0.2), (digits.validation, 0.08)):
        # at most one image of a class more or less than its share
        counts = torch.bincount(part.labels, minlength=10)
        assert (counts - share * torch.bincount(torch.from_numpy(load_digits().target))).abs().max() <= 1
    other = load_data(DataConfig(validation=0.3))
    assert torch.equal(other.test.images_nhwc, digits.test.images_nhwc)


def test_digits_keep_their_grey_levels(digits):
    everything = torch.cat([part.images_nhwc for part in (digits.train, digits.validation, digits.test)])
    assert everything.dtype == torch.uint8
    assert everything.min() == 0
    assert everything.max() == 255
    original = load_digits().images.mean() / 16
    # bilinear enlargement weights border pixels a little more
    assert abs(everything.float().mean() / 255 - original) < 0.02


def test_mean_and_std_are_those_of_the_train_images(digits):
    images = digits.train.images_nhwc.double() / 255
    assert digits.input.mean == pytest.approx((images.mean().item(),), abs=5e-5)
    assert digits.input.std == pytest.approx((images.std(correction=0).item(),), abs=5e-5)


def test_streamed_digits_are_the_ones_in_memory(digits):
    streamed = load_data(DataConfig(memory_gigabytes=0.0))
    assert isinstance(streamed.train, StreamedImages)
    assert isinstance(digits.train, MemoryImages)
    chosen = torch.tensor([0, 17, 1000])
    assert torch.equal(streamed.train.gather(chosen), digits.train.gather(chosen))
    assert streamed.input.mean == digits.input.mean


def test_load_test_brings_images_to_the_networks_input_and_order(digits):
    input = Input(height=48, width=40)
    test = load_test(DataConfig(size=32), input, digits.classes[::-1])
    assert test.gather(torch.tensor([0])).shape == (1, 48, 40, 3)
    assert torch.equal(test.labels, 9 - digits.test.labels)
    unnamed = load_test(DataConfig(), digits.input, tuple("abcdefghij"))
    assert torch.equal(unnamed.labels, digits.test.labels)
    with pytest.raises(DataError, match=r"digits has 10 classes \(0, 1, 2, 3, 4, \.\.\.\), the network 2 \(cat, dog\)"):
        load_test(DataConfig(), input, ("cat", "dog"))


@pytest.mark.parametrize("counts", [[1, 1, 2], [100, 3, 1], [7] * 10, [2]])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_holding_out_keeps_every_class_and_is_a_partition(counts, share):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    kept, aside = hold_out(labels, share, 0, "")
    assert sorted([*kept, *aside]) == list(range(len(labels)))
    assert set(labels[kept]) == set(labels)
    assert len(aside) <= max(1, round(share * len(labels)))
    assert (len(aside) > 0) == (share > 0)


def test_nothing_can_be_held_out_of_one_image_per_class():
    with pytest.raises(DataError, match="one of each class: none can be set aside: do this"):
        hold_out(np.arange(5), 0.2, 0, "do this")


def colour(label, size=(40, 40)):
    return Image.new("RGB", size, [(250, 0, 0), (0, 250, 0), (0, 0, 250)][label])


def image_folder(root, count=4, classes=("cat", "dog")):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            colour(label).save(root / name / f"{index}.png")
    return root


def test_a_folder_by_class_is_read_and_held_out(tmp_path):
    image_folder(tmp_path, 10)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    splits = load(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (14, 2, 4)
    assert (splits.input.height, splits.input.width, splits.input.channels) == (40, 40, 3)
    for part in (splits.train, splits.validation, splits.test):
        for image, label in zip(part.images_nhwc, part.labels, strict=True):
            assert image[0, 0].tolist() == list(colour(int(label)).getpixel((0, 0)))


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_train_and_test_folders_are_the_splits(tmp_path, test_name):
    image_folder(tmp_path / "train", 5)
    image_folder(tmp_path / test_name, 3)
    splits = load(tmp_path, validation=0.0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (10, 0, 6)
    assert splits.validation.gather(torch.zeros(0, dtype=torch.int64)).shape == (0, 40, 40, 3)


def test_hidden_files_and_what_lies_in_hidden_folders_are_passed_over(tmp_path):
    for name, place in (("a", "a"), ("b", "b"), ("b", "a/.ipynb_checkpoints"), ("b", "a/__MACOSX/inner")):
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(3):
            Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(folder / f"{name}{index}.png")
    (tmp_path / "a" / "._a0.png").write_bytes(b"no image")
    records = read_image_folder(tmp_path)["train"]
    assert records.classes == ("a", "b")
    assert np.bincount(records.labels).tolist() == [3, 3]


def test_links_to_folders_are_followed_and_a_circle_of_them_ends(tmp_path):
    images = image_folder(tmp_path / "elsewhere", 4)
    folder = tmp_path / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "more").symlink_to(images / name, target_is_directory=True)
        (folder / name / "more again").symlink_to(images / name, target_is_directory=True)
        (folder / name / "up").symlink_to(folder / name, target_is_directory=True)
        (folder / name / "all").symlink_to(folder, target_is_directory=True)
    assert np.bincount(read_image_folder(folder)["train"].labels).tolist() == [4, 4]


def test_images_of_every_kind_and_size_share_one_folder(tmp_path):
    image_folder(tmp_path / "test")
    train = image_folder(tmp_path / "train")
    Image.new("RGBA", (50, 70), (0, 0, 0, 0)).save(train / "cat" / "alpha.png")
    Image.new("L", (33, 90), 7).save(train / "cat" / "grey.jpg")
    Image.fromarray(np.full((64, 32), 65535, np.uint16)).save(train / "dog" / "deep.png")
    with pytest.raises(DataError, match=r"32 to 50 wide and 40 to 90 high: expected one square size: set data\.size"):
        load(tmp_path, validation=0.0)
    splits = load(tmp_path, size=36)
    assert splits.train.images_nhwc.shape[1:] == (36, 36, 3)
    assert load(tmp_path, size=36, channels=1).train.images_nhwc.shape[1:] == (36, 36, 1)


def test_small_and_grey_images_choose_32_and_one_channel(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for side in (8, 20, 28):
            Image.new("L", (side, 8), side).save(tmp_path / name / f"{side}.png")
    splits = load(tmp_path)
    assert splits.train.images_nhwc.shape[1:] == (32, 32, 1)


def test_one_colour_never_divides_by_nothing(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (32, 32), "red").save(tmp_path / name / f"{index}.png")
    assert load(tmp_path).input.std == (1e-3,) * 3


@pytest.mark.parametrize("memory_gigabytes", [4.0, 0.0])
def test_a_corrupt_file_is_named(tmp_path, memory_gigabytes):
    image_folder(tmp_path, 6)
    broken = tmp_path / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"dog.2\.png: cannot be (read|decoded)"):
        load(tmp_path, memory_gigabytes=memory_gigabytes, held_out=0.01, validation=0.0)


def test_folders_that_are_no_data_set_say_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="holds no folders: expected one folder of images per class"):
        load(tmp_path)
    image_folder(tmp_path / "one", classes=("cat",))
    with pytest.raises(DataError, match=r"one class \('cat'\): expected 2 or more"):
        load(tmp_path / "one")
    image_folder(tmp_path / "gap")
    (tmp_path / "gap" / "emu").mkdir()
    with pytest.raises(DataError, match="class 'emu' has no image"):
        load(tmp_path / "gap")
    image_folder(tmp_path / "split" / "test")
    with pytest.raises(DataError, match="no folder 'train'"):
        load(tmp_path / "split")
    image_folder(tmp_path / "split" / "train", classes=("cat", "emu"))
    with pytest.raises(DataError, match="class 'dog' is not in train"):
        load(tmp_path / "split")


@pytest.mark.parametrize(
    "source",
    ["./nowhere", "/no/such/folder", "~/no-such-folder-here", "~nobody-here/x", "f/" * 3000, "a b", "", "x\0y", "a/b/c"],
)
def test_sources_that_do_not_exist_are_refused(source):
    with pytest.raises(DataError):
        load(source)


def test_a_misspelt_name_gets_its_neighbour():
    with pytest.raises(UnknownNameError, match="unknown data set 'cifar1O': did you mean 'cifar10'"):
        load("cifar1O")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"images\.zip: expected a folder"):
        load(tmp_path / "images.zip")


def encoded(label, kind="PNG"):
    buffer = io.BytesIO()
    colour(label, (32, 32)).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def write_parquet(path, labels, names=("red", "green", "blue"), image="img", label="label", kind="WEBP", images=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = images or [
        {"bytes": encoded(value or 0, kind), "path": None} for value in np.clip([x or 0 for x in labels], 0, 2).tolist()
    ]
    columns = {
        image: pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        label: pa.array(labels, pa.int64()),
        "other": pa.array([True] * len(labels)),
    }
    table = pa.table(columns)
    if names:
        features = datasets.Features(
            {image: datasets.Image(), label: datasets.ClassLabel(names=list(names)), "other": datasets.Value("bool")}
        )
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, path, row_group_size=5)


LABELS = [0, 1, 2] * 6


def hub_layout(root, **changes):
    write_parquet(root / "data" / "train-00000-of-00002.parquet", LABELS[:9], **changes)
    write_parquet(root / "data" / "train-00001-of-00002.parquet", LABELS[9:], **changes)
    write_parquet(root / "data" / "test-00000-of-00001.parquet", LABELS[:6], **changes)
    return root


@pytest.mark.parametrize("changes", [{}, {"image": "image", "label": "fine_label", "kind": "PNG"}, {"names": None}])
@pytest.mark.parametrize("memory_gigabytes", [4.0, 0.0])
def test_parquet_is_read_in_memory_and_mapped(tmp_path, monkeypatch, changes, memory_gigabytes):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = load(hub_layout(tmp_path / "set", **changes), memory_gigabytes=memory_gigabytes)
    assert splits.classes == (("red", "green", "blue") if "names" not in changes else ("0", "1", "2"))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 2, 6)
    assert isinstance(splits.train, StreamedImages if memory_gigabytes == 0 else MemoryImages)
    assert splits.test.labels.tolist() == LABELS[:6]
    images = splits.train.gather(torch.arange(16))
    for image, label in zip(images, splits.train.labels, strict=True):
        assert image[5, 5].tolist() == list(colour(int(label)).getpixel((0, 0)))


def test_parquet_behind_a_link_is_found(tmp_path):
    write_parquet(tmp_path / "elsewhere" / "train.parquet", LABELS)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    splits = load(tmp_path / "set")
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == len(LABELS)


def test_parquet_written_by_datasets_is_read(tmp_path):
    images = [Image.fromarray(np.full((32, 32), value, np.uint8)) for value in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    made = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features=features)
    made.to_parquet(tmp_path / "all.parquet")
    splits = load(tmp_path / "all.parquet")
    assert splits.input.channels == 1
    assert sorted(
        torch.cat([part.images_nhwc[:, 0, 0, 0] for part in (splits.train, splits.validation, splits.test)]).tolist()
    ) == list(range(20))
    assert (splits.train.images_nhwc[:, 0, 0, 0] % 2 == splits.train.labels).all()


def test_labels_that_are_texts_name_the_classes(tmp_path):
    table = pa.table({"image": [encoded(label) for label in LABELS], "label": ["bcd"[label] for label in LABELS]})
    pq.write_table(table, tmp_path / "train.parquet")
    assert load(tmp_path).classes == ("b", "c", "d")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 3] * 3, r"train\.parquet, image 2: label 3 is out of range: expected 0 to 2"),
        ([0, 1, 2, -1], r"train\.parquet, image 3: label -1 is out of range"),
        ([0, None, 2], r"train\.parquet, image 1: 'label' is null"),
        ([0, 0, 2], r"no train image of 1 of 3 classes \(green\)"),
        ([], "no train images"),
    ],
)
def test_wrong_labels_are_named(tmp_path, labels, expected):
    write_parquet(tmp_path / "train.parquet", labels)
    with pytest.raises(DataError, match=expected):
        load(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"no image", encoded(1, "WEBP")[:30]])
def test_an_unreadable_row_is_named(tmp_path, content):
    images = [{"bytes": encoded(label), "path": None} for label in LABELS]
    images[7] = {"bytes": content, "path": None}
    write_parquet(tmp_path / "train.parquet", LABELS, images=images)
    with pytest.raises(DataError, match=r"train\.parquet, image 7: "):
        load(tmp_path)


def test_damaged_and_missing_parquet_files_are_named(tmp_path):
    hub_layout(tmp_path)
    second = tmp_path / "data" / "train-00001-of-00002.parquet"
    content = second.read_bytes()
    second.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: cannot be read as Parquet"):
        load(tmp_path)
    second.write_bytes(content[:50] + bytes(len(content) - 400) + content[-350:])
    with pytest.raises(DataError):
        load(tmp_path)
    second.unlink()
    with pytest.raises(DataError, match="part 00001 of 2 is missing"):
        load(tmp_path)


def test_columns_and_splits_that_are_missing_are_named(tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet", LABELS, image="picture", names=None)
    with pytest.raises(DataError, match=r"no column of images among picture, label, other: expected image or img"):
        load(tmp_path / "a")
    write_parquet(tmp_path / "b" / "train.parquet", LABELS, label="kind", names=None)
    with pytest.raises(DataError, match="no column of labels"):
        load(tmp_path / "b")
    write_parquet(tmp_path / "c" / "test.parquet", LABELS)
    with pytest.raises(DataError, match="no train split"):
        load(tmp_path / "c")
    pq.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="column 'image' is int64"):
        load(tmp_path / "train.parquet")
    write_parquet(tmp_path / "c" / "sub" / "train.parquet", LABELS)
    with pytest.raises(DataError, match="2 sets of Parquet files"):
        load(tmp_path / "c")


def fake_hub(monkeypatch, answer):
    def load_dataset(name, configuration=None):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "svhn", "someone/something"])
def test_a_hub_out_of_reach_says_what_to_do(monkeypatch, source):
    fake_hub(monkeypatch, ConnectionError("Couldn't reach the Hub\nmore lines"))
    with pytest.raises(DataError, match=r"cannot be read from the hub \(Couldn't reach the Hub\): connect .* local folder"):
        load(source)


def test_an_unknown_hub_name_is_no_network_error(monkeypatch):
    fake_hub(monkeypatch, datasets.exceptions.DatasetNotFoundError("not there"))
    with pytest.raises(DataError, match="'some/thing' is neither a local path nor a public data set"):
        load("some/thing")


def test_hub_data_sets_are_read_through_datasets(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub_layout(tmp_path / "set")
    files = {"train": str(tmp_path / "set/data/train*"), "test": str(tmp_path / "set/data/test*")}
    with hub.quiet_datasets():
        made = datasets.load_dataset("parquet", data_files=files)
    fake_hub(monkeypatch, datasets.DatasetDict({**made, "extra": made["test"]}))
    splits = load("someone/something:subset")
    assert splits.classes == ("red", "green", "blue")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 2, 6)


def test_silence_ends_with_its_block():
    assert not datasets.are_progress_bars_disabled()
    with hub.quiet_datasets():
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled()
