"""Augmentation against a slow loop over images, and the order of fetched batches."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dacnn.data.batches import ahead, apply, augment, draw
from dacnn.data.imageset import MemoryImages, StreamedImages, load_records
from dacnn.data.records import FileStore, Records
from dacnn.errors import ConfigError, DataError
from dacnn.networks.plan import Input


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(images, draws, crop, fill):
    """Mirror, pad by reflection, cut out, blank: one image after the other, as one would say it."""
    results = []
    for index, image in enumerate(images.numpy()):
        if draws.mirror[index]:
            image = image[:, ::-1]
        height, width, _ = image.shape
        padded = np.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode="reflect") if crop else image
        top, left = crop + int(draws.shift_y[index]), crop + int(draws.shift_x[index])
        image = padded[top : top + height, left : left + width].copy()
        if draws.cutout:
            top, left = int(draws.hole_y[index]) - draws.cutout // 2, int(draws.hole_x[index]) - draws.cutout // 2
            image[max(0, top) : max(0, top + draws.cutout), max(0, left) : max(0, left + draws.cutout)] = fill.numpy()
        results.append(image)
    return torch.from_numpy(np.stack(results)) if results else images


@settings(max_examples=60, deadline=None)
@given(
    count=st.sampled_from([0, 1, 2, 7]),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    channels=st.sampled_from([1, 3]),
    crop=st.integers(0, 11),
    flip=st.booleans(),
    cutout=st.integers(0, 14),
    seed=st.integers(0, 9),
)
def test_a_batch_is_augmented_as_its_images_one_by_one(count, height, width, channels, crop, flip, cutout, seed):
    crop = min(crop, height - 1, width - 1)
    images = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator(seed))
    draws = draw(count, height, width, crop=crop, flip=flip, cutout=cutout, generator=generator(seed))
    fill = torch.arange(7, 7 + channels, dtype=torch.uint8)
    expected = one_by_one(images, draws, crop, fill)
    # the mirror image of a shifted image is the mirrored image shifted the other way: both orders are one distribution,
    # so the slow loop must agree exactly once it mirrors where the fast one does
    assert torch.equal(apply(images, draws, fill), expected)


def test_slices_of_the_draws_augment_slices_of_the_batch():
    images = torch.randint(0, 256, (10, 8, 8, 3), dtype=torch.uint8, generator=generator())
    draws = draw(10, 8, 8, crop=3, flip=True, cutout=3, generator=generator())
    parts = [apply(images[part], draws[part]) for part in (slice(0, 4), slice(4, 5), slice(5, 10))]
    assert torch.equal(torch.cat(parts), apply(images, draws))
    assert len(draws[4:5]) == 1
    assert torch.equal(augment(images, crop=3, flip=True, cutout=3, generator=generator()), apply(images, draws))


def test_draws_cover_their_ranges_evenly():
    draws = draw(20_000, 32, 32, crop=4, flip=True, cutout=8, generator=generator())
    # 9 shifts, each with probability 1/9: 4 standard deviations of a binomial are 178
    for shift in (draws.shift_y, draws.shift_x):
        counts = torch.bincount(shift + 4, minlength=9)
        assert len(counts) == 9
        assert (counts - 20_000 / 9).abs().max() < 180
    assert abs(draws.mirror.float().mean() - 0.5) < 0.015
    assert draws.hole_y.min() == 0
    assert draws.hole_y.max() == 31


def test_switching_one_kind_off_leaves_the_other_draws_as_they_are():
    everything = draw(9, 8, 8, crop=2, flip=True, cutout=3, generator=generator())
    unflipped = draw(9, 8, 8, crop=2, flip=False, cutout=0, generator=generator())
    assert torch.equal(everything.shift_x, unflipped.shift_x)
    assert torch.equal(everything.hole_x, unflipped.hole_x)
    assert not unflipped.mirror.any()


def test_a_shift_as_large_as_the_image_is_refused():
    with pytest.raises(ConfigError, match=r"training.crop is 8: expected 0 to 7 for images of 8x9"):
        draw(1, 8, 9, crop=8, flip=False, cutout=0, generator=generator())


@pytest.fixture
def records(tmp_path):
    random = np.random.default_rng(0)
    paths = []
    for index in range(23):
        path = tmp_path / f"{index:02d}.png"
        Image.fromarray(random.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return Records.whole(FileStore(tuple(paths)), np.arange(23) % 2, ("even", "odd"))


BATCHES = [torch.tensor([3, 1, 22, 3]), torch.tensor([0]), *torch.arange(23).split(4)]


def test_streamed_batches_are_those_of_the_memory_set(records):
    memory = load_records(records, Input(), in_memory=True, name="")
    streamed = load_records(records, Input(), in_memory=False, name="")
    assert isinstance(memory, MemoryImages)
    assert isinstance(streamed, StreamedImages)
    assert streamed.nbytes == 0
    assert memory.nbytes == 23 * 32 * 32 * 3
    pairs = list(zip(ahead(memory, BATCHES), ahead(streamed, BATCHES), strict=True))
    assert len(pairs) == len(BATCHES)
    for (images, labels), (streamed_images, streamed_labels) in pairs:
        assert torch.equal(images, streamed_images)
        assert torch.equal(labels, streamed_labels)


def test_an_unreadable_image_surfaces_in_the_caller_after_the_batches_before_it(records):
    records.store.paths[6].write_bytes(b"no image")
    fetched = ahead(load_records(records, Input(), in_memory=False, name=""), [torch.tensor([0, 1]), torch.tensor([6])])
    next(fetched)
    with pytest.raises(DataError, match=r"06\.png: cannot be read as an image"):
        next(fetched)


def test_closing_the_iterator_stops_the_background_and_reads_no_more_than_a_few_batches_ahead(records):
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield torch.tensor([0, 1])

    fetched = ahead(load_records(records, Input(), in_memory=False, name=""), endless())
    next(fetched)
    fetched.close()
    assert len(asked) <= 6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dacnn-ahead")]


def test_progress_runs_up_to_all_images(records):
    calls = []
    load_records(records, Input(), in_memory=True, name="decoding train", progress=lambda *call: calls.append(call))
    assert calls[-1] == ("decoding train", 23, 23)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_images_without_labels_are_refused():
    with pytest.raises(DataError, match="expected uint8"):
        MemoryImages(torch.zeros(3, 2, 2, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ("a", "b"))
