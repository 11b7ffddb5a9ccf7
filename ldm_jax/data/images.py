"""One picture of any size and colour -> uint8 [H, W, C] of the size and number of channels that the model wants."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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


def fit(image: Image.Image | np.ndarray, *, size: int | None, channels: int, crop: str) -> np.ndarray:
    """The picture as the model takes it.

    Args:
        image: from `decode`, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        size: height and width of the result; None leaves them as they are.
        channels: 1 (ITU-R 601 luma) or 3. Transparent pictures are laid on white first.
        crop: "center" takes the largest square in the middle, "none" the whole picture, out of proportion if need be.
            Either is then resized by Pillow's bicubic filter, which averages (antialiases) when it shrinks.

    Returns:
        uint8 [size, size, channels].
    """
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = image[:, :, None]
        if image.shape[2] == channels and (size is None or image.shape[:2] == (size, size)):
            return image
        image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    image = _opaque(_eight_bit(image)).convert(MODES[channels])
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=_box(image.size, crop))
    return np.asarray(image).reshape(image.height, image.width, channels)


def fit_segments(image: Image.Image | np.ndarray, *, size: int | None, crop: str) -> np.ndarray:
    """A map of classes as the model takes it: cropped as its picture by `fit`, but never mixed.

    Args:
        image: from `decode`, grey or with a palette, or uint8 [H, W] or [H, W, 1]: pixels are the classes' numbers.
        size: height and width of the result; None leaves them as they are.
        crop: see `fit`.

    Returns:
        uint8 [size, size, 1].

    Raises:
        InputError: a picture in colour.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.reshape(image.shape[:2]))
    if image.mode not in ("L", "P", "1"):
        raise InputError(f"a map of classes must be grey or have a palette, not {image.mode}")
    if size is not None:
        image = image.resize((size, size), Image.Resampling.NEAREST, box=_box(image.size, crop))
    return np.asarray(image, np.uint8)[..., None]


def _box(size: tuple[int, int], crop: str) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of what is kept of a picture of (width, height)."""
    width, height = size
    if crop == "none":
        return 0, 0, width, height
    side = min(size)
    left, upper = (width - side) // 2, (height - side) // 2  # whole numbers: nothing is shifted by half a pixel
    return left, upper, left + side, upper + side


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
