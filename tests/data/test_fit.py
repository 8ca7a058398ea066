"""Images of every mode and size, as a user would expect them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from dacnn.data.fit import fit_image, read_image
from dacnn.errors import DataError
from dacnn.networks.plan import Input

COLOUR = Input(height=32, width=32)
GREY = Input(height=32, width=32, channels=1, mean=(0.5,), std=(0.25,))


def noise(*shape: int, dtype: type = np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def shaped(height: int, width: int, fit: str = "crop") -> Input:
    return Input(height=height, width=width, fit=fit)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_an_image_of_the_right_size_passes_bit_for_bit(fit):
    pixels = noise(20, 30, 3)
    assert np.array_equal(fit_image(Image.fromarray(pixels), shaped(20, 30, fit)), pixels)


def test_grey_becomes_three_equal_channels_and_colour_becomes_luma():
    grey = noise(32, 32)
    assert np.array_equal(fit_image(Image.fromarray(grey), COLOUR), np.stack([grey] * 3, axis=2))
    colour = noise(32, 32, 3)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    # Pillow rounds its fixed-point sum: one grey level at most
    assert np.abs(fit_image(Image.fromarray(colour), GREY)[:, :, 0] - luma).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_transparency_shows_white(mode):
    image = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    fitted = fit_image(image.convert(mode), COLOUR)
    assert (fitted[:, :16] == 0).all()
    assert (fitted[:, 16:] == 255).all()


def test_half_transparent_is_halfway_to_white():
    fitted = fit_image(Image.new("RGBA", (32, 32), (0, 100, 255, 128)), COLOUR)
    # 255 - 128/255 * (255 - v), rounded
    assert np.abs(fitted[0, 0].astype(int) - [127, 177, 255]).max() <= 1


def test_a_palette_with_a_transparent_entry_is_composited(tmp_path):
    image = Image.new("P", (32, 32), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (0, 0, 32, 16))
    image.save(tmp_path / "palette.png", transparency=0)
    fitted = read_image(tmp_path / "palette.png", COLOUR)
    assert (fitted[0, 0] == [0, 0, 200]).all()
    assert (fitted[31, 0] == 255).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, dtype):
    values = noise(32, 32, dtype=dtype, high=65536)
    values[0, :2] = [0, 65535]
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    fitted = read_image(tmp_path / "deep.tiff", GREY)[:, :, 0]
    assert np.array_equal(fitted, np.round(values / 257).astype(np.uint8))
    assert (fitted[0, :2] == [0, 255]).all()


def test_cmyk_and_bilevel_are_converted():
    assert (fit_image(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), COLOUR)[0, 0] == [255, 0, 0]).all()
    assert (fit_image(Image.new("1", (32, 32), 1), GREY) == 255).all()


@pytest.mark.parametrize("image", [Image.new("F", (32, 32)), Image.fromarray(np.full((32, 32), 70_000, np.int32))])
def test_pixels_without_a_known_white_are_refused(image):
    with pytest.raises(DataError, match="convert the image"):
        fit_image(image, COLOUR)


def test_other_channels_than_grey_and_colour_are_refused():
    with pytest.raises(DataError, match="has 2 channels"):
        fit_image(Image.new("L", (2, 2)), Input(channels=2, mean=(0, 0), std=(1, 1)))


def test_exif_orientation_is_applied(tmp_path):
    pixels = noise(32, 32, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    # 6: the camera was turned, the first row of the file is the right side
    assert np.array_equal(read_image(tmp_path / "turned.png", COLOUR), np.rot90(pixels, -1))


def test_crop_scales_the_shorter_side_and_keeps_the_middle():
    image = Image.fromarray(noise(60, 100, 3))
    expected = np.asarray(ImageOps.fit(image, (32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(fit_image(image, COLOUR), expected)
    # whole pixels: cutting without scaling
    assert np.array_equal(fit_image(image, shaped(60, 80)), np.asarray(image)[:, 10:90])


def test_pad_scales_the_longer_side_and_adds_black():
    fitted = fit_image(Image.new("RGB", (100, 50), (9, 9, 9)), shaped(32, 32, "pad"))
    assert (fitted[8:24] == 9).all()
    assert not fitted[:8].any()
    assert not fitted[24:].any()


def test_stretch_scales_both_sides():
    image = Image.fromarray(noise(50, 100, 3))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(fit_image(image, shaped(32, 32, "stretch")), expected)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (33, 31)])
def test_any_size_comes_out_as_asked(fit, size):
    assert fit_image(Image.new("RGB", size, "white"), shaped(32, 48, fit)).shape == (32, 48, 3)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_give_one_error_that_names_them(tmp_path, kind):
    content = encoded(kind)
    for length in (0, 3, len(content) // 2):
        path = tmp_path / f"cut-{length}.{kind.lower()}"
        path.write_bytes(content[:length])
        with pytest.raises(DataError) as caught:
            read_image(path, COLOUR)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.png: there is no such file"):
        read_image(tmp_path / "none.png", COLOUR)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path, COLOUR)
