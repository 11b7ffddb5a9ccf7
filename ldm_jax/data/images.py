"""Decoding image files and bringing images to one size and number of channels: uint8 [H, W, C]."""

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ldm_jax.errors import InputError

MODES = {1: "L", 3: "RGB"}
CROPS = ("center", "none")
DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's errors for damaged files


def decode(content: bytes) -> Image.Image:
    """The image in an image file's bytes, upright by its EXIF orientation; InputError if damaged or not an image."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
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


def fit(image: Image.Image | np.ndarray, *, size: int | tuple[int, int] | None, channels: int, crop: str) -> np.ndarray:
    """An image cropped, resized and converted to a number of channels.

    Args:
        image: from `decode`, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        size: of the result: one number for both sides, or (height, width); None keeps the image's.
        channels: 1 (ITU-R 601 luma) or 3. Transparent images are laid on white first.
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
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    image = on_white(image).convert(MODES[channels])
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


def on_white(image: Image.Image) -> Image.Image:
    """A transparent image on a white background; any other image as it is."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


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
