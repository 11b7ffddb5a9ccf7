"""One picture of any size and colour -> uint8 [H, W, C] of the size and number of channels that the model wants."""

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ldm_jax.errors import InputError

MODES = {1: "L", 3: "RGB"}
CROPS = ("center", "none")


def decode(content: bytes) -> Image.Image:
    """The picture in an image file's bytes (PNG, JPEG, WebP, ...), turned upright as its EXIF tag says.

    Raises:
        InputError: the bytes are no picture, or a truncated one.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise InputError(f"not a picture in any format that Pillow reads ({len(content)} bytes)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"not a readable picture ({error})") from None


def shape_of(content: bytes) -> tuple[int, int]:
    """Height and width of the picture in an image file's bytes, upright, by its header; InputError as `decode`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            sides = image.size
            on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"not a readable picture ({error})") from None
    return sides if on_its_side else sides[::-1]


def fit(image: Image.Image | np.ndarray, *, size: int | tuple[int, int] | None, channels: int, crop: str) -> np.ndarray:
    """The picture as the model takes it.

    Args:
        image: from `decode`, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        size: of the result: one number for both sides, or (height, width); None leaves them as they are.
        channels: 1 (ITU-R 601 luma) or 3. Transparent pictures are laid on white first.
        crop: "center" takes the largest part in the middle that has the result's proportions, "none" the whole
            picture, out of proportion if need be. Either is then resized by Pillow's bicubic filter, which averages
            (antialiases) when it shrinks.

    Returns:
        uint8 [height, width, channels].
    """
    shape = _both_sides(size)
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = image[:, :, None]
        if image.shape[2] == channels and shape in (None, image.shape[:2]):
            return image
        image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    image = _opaque(_eight_bit(image)).convert(MODES[channels])
    if shape is not None:
        image = image.resize(shape[::-1], Image.Resampling.BICUBIC, box=_box(image.size, crop, shape))
    return np.asarray(image).reshape(image.height, image.width, channels)


def fit_segments(image: Image.Image | np.ndarray, *, size: int | tuple[int, int] | None, crop: str) -> np.ndarray:
    """A map of classes as the model takes it: cropped as its picture by `fit`, but never mixed.

    Args:
        image: from `decode`, grey or with a palette, or uint8 [H, W] or [H, W, 1]: pixels are the classes' numbers.
        size, crop: see `fit`.

    Returns:
        uint8 [height, width, 1].

    Raises:
        InputError: a picture in colour.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.reshape(image.shape[:2]))
    if image.mode not in ("L", "P", "1"):
        raise InputError(f"a map of classes must be grey or have a palette, not {image.mode}")
    shape = _both_sides(size)
    if shape is not None:
        image = image.resize(shape[::-1], Image.Resampling.NEAREST, box=_box(image.size, crop, shape))
    return np.asarray(image, np.uint8)[..., None]


def _both_sides(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def _box(size: tuple[int, int], crop: str, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of what is kept of a picture of (width, height) to become (height, width)."""
    width, height = size
    if crop == "none":
        return 0, 0, width, height
    # Whole numbers: nothing is shifted by half a pixel.
    kept_width = max(1, min(width, height * shape[1] // shape[0]))
    kept_height = max(1, min(height, width * shape[0] // shape[1]))
    left, upper = (width - kept_width) // 2, (height - kept_height) // 2
    return left, upper, left + kept_width, upper + kept_height


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8; Pillow's own conversion would clip it."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """A picture with transparency, laid on white."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
