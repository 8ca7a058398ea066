"""One image: opened without surprises, brought to the size and the channels that a network takes."""

# H rows, W columns, C channels

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dacnn.data.reasons import reason
from dacnn.errors import DataError
from dacnn.networks.plan import Input

Pixels = npt.NDArray[np.uint8]

# what Pillow's readers raise when a file is not what its first bytes promise
_UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
)
_WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}


def open_image(source: Path | bytes, where: str) -> Image.Image:
    """Open an image: its size and mode are known, its pixels not yet decoded.

    Args:
        source: A file, or the bytes of one.
        where: Names the image in error messages.

    Returns:
        The image.

    Raises:
        DataError: The file is missing or no image that Pillow reads.
    """
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such file: expected an image") from None
    except _UNREADABLE as error:
        raise DataError(f"{where}: cannot be read as an image ({_reason(error)}): replace or remove it") from None


def is_grey(image: Image.Image) -> bool:
    """Whether the image has no colour by its mode (a colour file that happens to show grey counts as colour)."""
    return image.mode in _GREY


def read_image(source: Path | bytes, input: Input, where: str | None = None) -> Pixels:
    """Open, decode and fit one image.

    Args:
        source: A file, or the bytes of one.
        input: What the network takes.
        where: Names the image in error messages; default: the path.

    Returns:
        uint8 pixels, shape (H, W, C).

    Raises:
        DataError: The image is missing, unreadable or truncated, or of a kind that has no defined conversion.
    """
    where = where or (str(source) if isinstance(source, Path) else "image")
    with open_image(source, where) as image:
        try:
            image.load()
            return fit_image(image, input)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        except _UNREADABLE as error:
            raise DataError(f"{where}: cannot be decoded ({_reason(error)}): replace or remove it") from None


def fit_image(image: Image.Image, input: Input) -> Pixels:
    """Bring an image to a network's input: upright, 8 bits, over white, right channels, right size.

    An image that is right already passes bit for bit.

    Args:
        image: Any image of Pillow.
        input: Height, width, channels and fit.

    Returns:
        uint8 pixels, shape (H, W, C).

    Raises:
        DataError: The pixels are floating point or of more than 16 bits, or `input` is neither grey nor colour.
    """
    if input.channels not in (1, 3):
        raise DataError(f"the input has {input.channels} channels: expected 1 (grey) or 3 (colour) for images")
    upright = ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
    plain = _resized(_converted(upright, "L" if input.channels == 1 else "RGB"), input)
    return np.array(plain, dtype=np.uint8).reshape(input.height, input.width, input.channels)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image as 8-bit grey (`L`) or colour (`RGB`), without transparency."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise DataError("the pixels are floating point: expected 8 or 16 bits, whose white is known: convert the image")
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        image = Image.alpha_composite(white, over).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, 65535 to 255."""
    values = np.asarray(image).astype(np.int64)
    if values.size and not (values.min() >= 0 and values.max() <= 65535):
        raise DataError(f"the pixels run from {values.min()} to {values.max()}: expected 0 to 65535: convert the image")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _resized(image: Image.Image, input: Input) -> Image.Image:
    """The image at the input's size, bilinear and antialiased."""
    target = (input.width, input.height)
    if image.size == target:
        return image
    (width, height), bilinear = image.size, Image.Resampling.BILINEAR
    if input.fit == "stretch":
        return image.resize(target, bilinear)
    if input.fit == "crop":
        kept_width = min(float(width), height * input.width / input.height)
        kept_height = min(float(height), width * input.height / input.width)
        left, top = (width - kept_width) / 2, (height - kept_height) / 2
        return image.resize(target, bilinear, box=(left, top, left + kept_width, top + kept_height))
    scale = min(input.width / width, input.height / height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = Image.new(image.mode, target)
    canvas.paste(image.resize(inner, bilinear), ((target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2))
    return canvas


def _reason(error: BaseException) -> str:
    # Pillow's own words name the address of a buffer
    return "no known image format" if isinstance(error, UnidentifiedImageError) else reason(error)
