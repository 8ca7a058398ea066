"""Official archives, written here as their authors wrote them; pickles that ask for more are refused."""

import contextlib
import os
import pickle
import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from dacnn.config import DataConfig
from dacnn.data.archives import find_archive
from dacnn.data.pickles import read_pickle
from dacnn.data.sources import find_source, load_data
from dacnn.errors import DataError
from dacnn.networks.plan import Input

TEN = [f"name{number}" for number in range(10)]


def batch(count: int, seed: int, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return images, np.arange(count) % classes


def write_python(folder, protocol=2):
    folder.mkdir()
    expected = []
    for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        images, labels = batch(10, seed)
        expected.append(images)
        table = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": images, b"filenames": [b"x.png"] * 10}
        (folder / name).write_bytes(pickle.dumps(table, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in TEN]}, protocol))
    return np.concatenate(expected[:5]), expected[5]


def write_binary(folder):
    folder.mkdir()
    for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        images, labels = batch(10, seed)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels[:, None].astype(np.uint8), images]).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")


def pixels(records):
    return np.stack([records.read(index, Input()) for index in range(len(records))])


def as_images(table):
    """C x H x W to H x W x C, one image after the other."""
    return np.stack(
        [np.dstack([row[:1024].reshape(32, 32), row[1024:2048].reshape(32, 32), row[2048:].reshape(32, 32)]) for row in table]
    )


# 0 to 2: Python 2 and what it wrote; 5: NumPy's own way of today
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_python_batches_of_every_protocol_are_read(tmp_path, protocol):
    train, test = write_python(tmp_path / "any-name", protocol)
    splits = find_archive(tmp_path / "any-name")()
    assert np.array_equal(pixels(splits["train"]), as_images(train))
    assert np.array_equal(pixels(splits["test"]), as_images(test))
    assert splits["train"].classes == tuple(TEN)
    assert splits["train"].labels.tolist() == list(range(10)) * 5
    assert "data_batch_2, image 3" in splits["train"].where(13)


def test_a_pickle_of_python_2_is_read():
    # b"(dp0\nS'data'..." : what cPickle of Python 2 wrote for {'labels': [1], 'data': array([[7, 9]], dtype=uint8)}
    content = (
        b"(dp1\nS'labels'\np2\n(lp3\nI1\nasS'data'\np4\ncnumpy.core.multiarray\n_reconstruct\np5\n(cnumpy\nndarray\np6\n(I0\ntS'b'\ntRp7\n"
        b"(I1\n(I1\nI2\ntcnumpy\ndtype\np8\n(S'u1'\nI0\nI1\ntRp9\n(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x07\\x09'\ntbs."
    )
    table = read_pickle(content, "old")
    assert table[b"labels"] == [1]
    assert table[b"data"].tolist() == [[7, 9]]
    assert table[b"data"].dtype == np.uint8


def test_arrays_of_both_orders_and_scalars_are_read():
    array = np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3))
    assert np.array_equal(read_pickle(pickle.dumps(array, 2), "x"), array)
    assert read_pickle(pickle.dumps([np.int64(-3), np.uint8(200)], 2), "x") == [-3, 200]


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class System:
    def __reduce__(self):
        return (os.system, ("exit 1",))


def test_a_pickle_that_calls_functions_is_refused_and_not_run(tmp_path):
    target = tmp_path / "written"
    write_python(tmp_path / "cifar")
    (tmp_path / "cifar" / "data_batch_3").write_bytes(pickle.dumps({b"data": Touch(target)}))
    with pytest.raises(DataError, match=r"data_batch_3: refused as a pickle \(it asks for (_?io)\.open"):
        find_archive(tmp_path / "cifar")()
    assert not target.exists()
    with pytest.raises(DataError, match="it asks for posix.system|nt.system"):
        read_pickle(pickle.dumps(System()), "x")


@pytest.mark.parametrize(
    "value", [np.array([object()], dtype=object), np.zeros(2), {1, 2.5}, b"x" * 100, np.load, np.random.RandomState]
)
def test_foreign_and_cut_pickles_give_one_line(value):
    content = pickle.dumps(value, 2)
    with pytest.raises(DataError) as caught:
        read_pickle(content[:-2] if isinstance(value, bytes | set) else content, "some file")
    assert str(caught.value).startswith("some file: ")
    assert "\n" not in str(caught.value)


def test_random_bytes_never_raise_anything_else():
    random = np.random.default_rng(0)
    good = bytearray(pickle.dumps({"data": np.arange(20, dtype=np.uint8), "labels": [1, 2]}, 2))
    for _ in range(2000):
        content = good.copy()
        for _ in range(3):
            content[random.integers(len(content))] = random.integers(256)
        with contextlib.suppress(DataError):
            read_pickle(bytes(content), "x")


@pytest.mark.parametrize("damage", ["missing", "truncated", "labels", "shape", "short", "range"])
def test_damaged_python_batches_name_the_file(tmp_path, damage):
    write_python(tmp_path / "cifar")
    path = tmp_path / "cifar" / "data_batch_4"
    images, labels = batch(10, 0)
    tables = {
        "labels": {b"data": images, b"labels": ["1"] * 10},
        "shape": {b"data": images[:, :100], b"labels": labels.tolist()},
        "short": {b"data": images[:9], b"labels": labels[:9].tolist()},
        "range": {b"data": images, b"labels": [*labels[:9].tolist(), 10]},
    }
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.write_bytes(pickle.dumps(tables[damage]))
    with pytest.raises(DataError, match="data_batch_4"):
        find_source(DataConfig(source=str(tmp_path / "cifar")))


def test_binary_batches_are_the_python_batches(tmp_path):
    train, test = write_python(tmp_path / "py")
    write_binary(tmp_path / "bin")
    splits = find_archive(tmp_path / "bin")()
    assert np.array_equal(pixels(splits["train"]), as_images(train))
    assert np.array_equal(pixels(splits["test"]), as_images(test))
    assert splits["test"].labels.tolist() == list(range(10))
    assert splits["test"].classes == tuple(TEN)


@pytest.mark.parametrize(
    ("size", "expected"), [(3073 * 10 - 1, "multiple of 3073"), (0, "multiple of 3073"), (3073 * 4, "4 images")]
)
def test_binary_batches_of_a_wrong_length_are_refused(tmp_path, size, expected):
    write_binary(tmp_path / "bin")
    path = tmp_path / "bin" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=rf"data_batch_2\.bin: .*{expected}"):
        find_source(DataConfig(source=str(tmp_path / "bin")))


def test_cifar100_takes_the_fine_label_from_both_forms(tmp_path):
    images, labels = batch(200, 0, 100)
    names = [f"fine{number}" for number in range(100)]
    python, binary = tmp_path / "cifar-100-python", tmp_path / "cifar-100-binary"
    python.mkdir()
    binary.mkdir()
    for split in ("train", "test"):
        table = {b"data": images, b"fine_labels": labels.tolist(), b"coarse_labels": [3] * 200}
        (python / split).write_bytes(pickle.dumps(table, 2))
        coarse = np.full((200, 1), 3, np.uint8)
        (binary / f"{split}.bin").write_bytes(np.hstack([coarse, labels[:, None].astype(np.uint8), images]).tobytes())
    (python / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, 2))
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    for folder in (python, binary):
        splits = find_archive(folder)()
        assert splits["train"].labels.tolist() == labels.tolist()
        assert splits["train"].classes == tuple(names)
        assert np.array_equal(pixels(splits["train"])[:5], as_images(images[:5]))
    # the folder around the archive's own is found as well
    (tmp_path / "around").mkdir()
    python.rename(tmp_path / "around" / "cifar-100-python")
    assert len(find_archive(tmp_path / "around")()["test"]) == 200


def test_a_tar_is_read_without_unpacking(tmp_path):
    train, _ = write_python(tmp_path / "cifar-10-batches-py")
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    splits = load_data(DataConfig(source=str(path), validation=0.0))
    assert np.array_equal(splits.train.images_nhwc.numpy(), as_images(train))
    assert splits.input.height == 32
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: damaged or truncated"):
        load_data(DataConfig(source=str(path)))
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "cifar-10-batches-py" / "batches.meta", "notes")
    with pytest.raises(DataError, match=r"other\.tar: expected an archive"):
        load_data(DataConfig(source=str(tmp_path / "other.tar")))


def write_svhn(folder, labels, count=None):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, count or len(labels)), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(
            folder / f"{split}_32x32.mat", {"X": images, "y": np.array(labels)[:, None].astype(np.uint8)}, do_compression=True
        )
    return images


def test_svhn_reads_ten_as_zero(tmp_path):
    labels = [*range(1, 11), 10, 3]
    images = write_svhn(tmp_path, labels)
    for source in (tmp_path, tmp_path / "train_32x32.mat"):
        splits = find_source(DataConfig(source=str(source)))
        assert splits["train"].labels.tolist() == [*range(1, 10), 0, 0, 3]
        assert splits["train"].classes == tuple("0123456789")
        assert np.array_equal(pixels(splits["test"])[7], images[:, :, :, 7])


@pytest.mark.parametrize(
    ("labels", "count", "expected"),
    [([1, 11], 2, "image 1: label 11"), ([0, 1], 2, "image 0: label 0"), ([1, 2], 3, "each of 3")],
)
def test_svhn_labels_are_checked(tmp_path, labels, count, expected):
    write_svhn(tmp_path, labels, count)
    with pytest.raises(DataError, match=expected):
        find_source(DataConfig(source=str(tmp_path)))


def test_svhn_of_a_wrong_shape_a_truncated_and_a_missing_file_are_refused(tmp_path):
    write_svhn(tmp_path, range(1, 11))
    path = tmp_path / "test_32x32.mat"
    content = path.read_bytes()
    for size in (0, 10, 130, 200, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"test_32x32\.mat"):
            find_source(DataConfig(source=str(tmp_path)))
    savemat(path, {"X": np.zeros((16, 32, 3, 2), np.uint8), "y": [[1], [2]]})
    with pytest.raises(DataError, match="expected uint8 of shape"):
        find_source(DataConfig(source=str(tmp_path)))
    path.unlink()
    with pytest.raises(DataError, match=r"test_32x32\.mat: missing"):
        find_source(DataConfig(source=str(tmp_path)))
