"""Decoding image files and bringing images to one size and number of channels: uint8 [H, W, C]."""

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ldm_jax.errors import InputError

MODES = {1: "L", 3: "RGB"}
CROPS = ("center", "none")
FULL_SCALES = (1, 255, 4095, 65535)  # the largest value of floats, and of 8, 12 and 16 bits
TINT = 8  # levels of 255 by which the colours of a grey image may differ, as after JPEG
DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's errors for damaged files


def decode(content: bytes) -> Image.Image:
    """The image in an image file's bytes, upright by its EXIF orientation; InputError if damaged or not an image."""
    try:
        image = Image.open(io.BytesIO(content))
        args = image.tile[0].args if image.tile else ""
        raw_mode = str(args[0] if isinstance(args, tuple) and args else args)
        image.load()
        is_16_bit = raw_mode.endswith((";16B", ";16L", ";16N")) and len(image.getbands()) > 1
        if is_16_bit and 0 < max(band.getextrema()[1] for band in image.split()) < 16:
            raise InputError("12-bit colours in a file of 16 bits, of which Pillow reads the first 8: convert it")
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise InputError(f"not an image in any format that Pillow reads ({len(content)} bytes)") from None
    except DAMAGE as error:
        raise InputError(f"not a readable image ({error})") from None


def shape_of(content: bytes) -> tuple[int, int]:
    """Height and width of the upright image in an image file's bytes, by its header; InputError as in `decode`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            sides = image.size
            on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except DAMAGE as error:
        raise InputError(f"not a readable image ({error})") from None
    return sides if on_its_side else sides[::-1]


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits, or of floats, in 8 bits; any other image as it is.

    The full scale, white, is 255, 4095 or 65535, of floats also 1: the least that no value exceeds. The one
    transparent value of a PNG becomes an alpha channel. Raises InputError for values outside these scales.
    """
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > FULL_SCALES[-1]:
        raise InputError(f"grey values from {values.min():g} to {values.max():g}; they must be from 0 to 65535")
    scales = FULL_SCALES[image.mode[0] == "I" :]
    full = next(scale for scale in scales if values.max() <= scale)
    grey = Image.fromarray(np.round(values * (255 / full)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def fit(image: Image.Image | np.ndarray, *, size: int | tuple[int, int] | None, channels: int, crop: str) -> np.ndarray:
    """An image cropped, resized and converted to a number of channels.

    Args:
        image: from `decode`, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        size: of the result: one number for both sides, or (height, width); None keeps the image's.
        channels: 1 (ITU-R 601 luma) or 3. Transparent images are laid on white first, those of more than 8 bits are
            scaled by `eight_bits`.
        crop: "center" keeps the largest central part of the result's aspect ratio, "none" the whole image, whose
            aspect ratio may change. Either is then resized by Pillow's bicubic filter, with antialiasing.

    Returns:
        uint8 [height, width, channels].
    """
    shape = (size, size) if isinstance(size, int) else size
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = image[:, :, None]
        if image.shape[2] == channels and shape in (None, image.shape[:2]):
            return image
        image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    image = on_background(eight_bits(image), "white").convert(MODES[channels])
    if shape is not None:
        image = image.resize(shape[::-1], Image.Resampling.BICUBIC, box=_box(image.size, crop, shape))
    return np.asarray(image).reshape(image.height, image.width, channels)


def fit_segments(image: Image.Image | np.ndarray, *, size: int | tuple[int, int] | None, crop: str) -> np.ndarray:
    """A segmentation map uint8 [height, width, 1], cropped and resized as its image by `fit`, by nearest neighbour.

    `image` is from `decode`, grey or with a palette, or uint8 [H, W] or [H, W, 1]; its pixels are class numbers. Raises
    InputError for an image in colour.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.reshape(image.shape[:2]))
    if image.mode not in ("L", "P", "1"):
        raise InputError(f"a segmentation map must be grey or have a palette, not {image.mode}")
    shape = (size, size) if isinstance(size, int) else size
    if shape is not None:
        image = image.resize(shape[::-1], Image.Resampling.NEAREST, box=_box(image.size, crop, shape))
    return np.asarray(image, np.uint8)[..., None]


def on_background(image: Image.Image, colour: str) -> Image.Image:
    """A transparent image on a background of one colour; any other image as it is."""
    if not image.has_transparency_data:
        return image
    image = with_alpha(image)
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)


def with_alpha(image: Image.Image) -> Image.Image:
    """A transparent image as RGBA."""
    if image.mode == "La":  # of premultiplied grey, which Pillow converts to nothing else
        image = image.convert("LA")
    return image.convert("RGBA")


def is_grey(image: Image.Image | np.ndarray) -> bool:
    """Whether an image has no colour: the red, green and blue of each pixel differ by at most TINT levels.

    `image` is from `decode`, or uint8 [H, W], [H, W, 1] or [H, W, 3], as of `fit`.
    """
    if isinstance(image, Image.Image) and image.mode in ("1", "L", "LA", "La"):
        return True
    colours = fit(image, size=None, channels=3, crop="none").astype(np.int16)
    return bool((colours.max(axis=-1) - colours.min(axis=-1)).max() <= TINT)


def _box(size: tuple[int, int], crop: str, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of the part of an image of (width, height) that is resized to (height, width)."""
    width, height = size
    if crop == "none":
        return 0, 0, width, height
    # Whole numbers: nothing is shifted by half a pixel.
    kept_width = max(1, min(width, height * shape[1] // shape[0]))
    kept_height = max(1, min(height, width * shape[0] // shape[1]))
    left, upper = (width - kept_width) // 2, (height - kept_height) // 2
    return left, upper, left + kept_width, upper + kept_height
