"""Image inputs of sampling: initial images, masks, outpainting and initial noise from files; interpolation of noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from ldm_jax.data.images import decode, eight_bits, fit, fit_segments, on_background, with_alpha
from ldm_jax.errors import InputError

SAME = 8  # levels of 255 by which two files of one image differ at most
ROUNDED = 0.05  # of an image may be cropped without a line about it, as sides are multiples of a latent's pixels
SIDES = {"left": (1, True), "right": (1, False), "up": (0, True), "down": (0, False)}  # axis; before the image?


@contextmanager
def named(flag: str, path: Path) -> Iterator[None]:
    """A context in which an InputError or OSError about an image file becomes an InputError that names its flag."""
    try:
        yield
    except (InputError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{flag}={path}: {reason}") from error


def open_image(path: Path, flag: str) -> Image.Image:
    """An image file as it is; raises InputError, which names `flag`, if it cannot be read."""
    with named(flag, path):
        return decode(path.read_bytes())


def read_image(path: Path, flag: str, *, size: tuple[int, int], channels: int, crop: str) -> np.ndarray:
    """An image file at the model's size, uint8 [*size, channels]; raises InputError, which names `flag`."""
    with named(flag, path):
        return fit(decode(path.read_bytes()), size=size, channels=channels, crop=crop)


def read_segments(path: Path, flag: str, *, size: tuple[int, int], crop: str) -> np.ndarray:
    """A segmentation map's file at the model's size, uint8 [*size, 1]; raises InputError, which names `flag`."""
    with named(flag, path):
        return fit_segments(decode(path.read_bytes()), size=size, crop=crop)


def read_mask(path: Path, image_path: Path, *, size: tuple[int, int], crop: str) -> np.ndarray:
    """The inpainting mask, bool [*size], True where the file is white (to be sampled); cropped as its image is.

    What is transparent is kept; but if the file is the image itself with a part erased, that part is sampled. Raises
    InputError for another size than the image's, or if nothing is white.
    """
    mask, image = open_image(path, "--mask"), open_image(image_path, "--init_image")
    if mask.size != image.size:
        raise InputError(
            f"--mask={path} is {mask.width}x{mask.height}; it must be {image.width}x{image.height} like "
            f"--init_image={image_path}"
        )
    with named("--mask", path):
        mask = eight_bits(mask)
    with named("--init_image", image_path):
        mask = _erased_part(mask, image) or on_background(mask, "black")
    white = fit(mask, size=size, channels=1, crop=crop)[..., 0] >= 128
    if not white.any():
        raise InputError(f"--mask={path} has no white part; white is what is sampled")
    return white


def _erased_part(mask: Image.Image, image: Image.Image) -> Image.Image | None:
    """White where `mask` is transparent, if its opaque part is that of the image and not black and white; else None."""
    if not mask.has_transparency_data:
        return None
    colours, alpha = np.split(np.asarray(with_alpha(mask), int), [3], axis=-1)
    opaque = alpha[..., 0] == 255
    colours, original = colours[opaque], np.asarray(on_background(eight_bits(image), "white").convert("RGB"))[opaque]
    if not opaque.any() or np.isin(colours, (0, 255)).all() or np.abs(colours - original).max() > SAME:
        return None
    return Image.fromarray((255 - alpha[..., 0]).astype(np.uint8))


def size_like(image: tuple[int, int], model: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width) of samples that start from an image, multiples of `multiple`, from the image's and the model's.

    An image of the model's proportions is resized to its size. Any other keeps its own size, as in diffusers, unless it
    has less than a quarter or more than four times the model's pixels: then it is resized to about as many.
    """
    ratio = model[0] * model[1] / (image[0] * image[1])
    at_model = tuple(max(round(side * ratio**0.5 / multiple), 1) * multiple for side in image)
    if at_model == tuple(model):
        return at_model
    own = tuple(side // multiple * multiple for side in image)
    return own if 1 / 4 <= ratio <= 4 and min(own) else at_model


def cropped_size(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int] | None:
    """(height, width) of the central part of an image that is resized to `size`; None for all but ROUNDED of it."""
    ratio = min(image[0] / size[0], image[1] / size[1])
    kept = tuple(round(ratio * side) for side in size)
    return None if kept[0] * kept[1] >= (1 - ROUNDED) * image[0] * image[1] else kept


def outpaint_window(image: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The image and mask of outpainting as inpainting: the image shifted so that its new part fits, and that part.

    Of an image uint8 [H, W, C] and e.g. "right:8" (side and pixels): uint8 [H, W, C], where the new part repeats the
    edge, and bool [H, W]. Raises InputError for another side, or not from 1 pixel to one less than the image has.
    """
    side, _, pixels = where.partition(":")
    axis, before = SIDES.get(side, (0, True))
    size = image.shape[axis]
    if side not in SIDES or not pixels.isdecimal() or not 0 < int(pixels) < size:
        raise InputError(f"--outpaint={where} must be {', '.join(SIDES)}, and 1 to {size - 1} pixels, e.g. right:8")
    padding = [(0, 0)] * 3
    padding[axis] = (int(pixels), 0) if before else (0, int(pixels))
    window = (slice(None),) * axis + (slice(size) if before else slice(-size, None),)
    new = np.pad(np.zeros(image.shape[:2], bool), padding[:2], constant_values=True)
    return np.pad(image, padding, mode="edge")[window], new[window]


def outpainted(image: np.ndarray, samples: np.ndarray, where: str) -> np.ndarray:
    """The image [H, W, C] extended by the new part of sampled windows [N, H, W, C]: [N, H or more, W or more, C]."""
    side, _, pixels = where.partition(":")
    axis, before = SIDES[side][0] + 1, SIDES[side][1]
    new = samples[(slice(None),) * axis + (slice(int(pixels)) if before else slice(-int(pixels), None),)]
    parts = [new, np.broadcast_to(image, samples.shape)]
    return np.concatenate(parts if before else parts[::-1], axis=axis)


def read_latents(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The initial noise of --init_latents; raises InputError unless it is finite float32 of this shape [N, h, w, c]."""
    try:
        z_T = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise InputError(f"--init_latents={path} cannot be read as .npy: {error}") from error
    if not isinstance(z_T, np.ndarray) or z_T.shape != shape or z_T.dtype != np.float32:
        given = f"{z_T.dtype}{list(z_T.shape)}" if isinstance(z_T, np.ndarray) else "an archive"
        raise InputError(f"--init_latents={path} is {given}; it must be float32{list(shape)}")
    if not np.isfinite(z_T).all():
        raise InputError(f"--init_latents={path} holds values that are not finite")
    return z_T


def latent_mask(mask: np.ndarray, factor: int) -> np.ndarray:
    """The mask of latents, bool [H, W] -> bool [H / factor, W / factor, 1]: True if any of its pixels is."""
    h, w = (side // factor for side in mask.shape)
    return mask.reshape(h, factor, w, factor).any((1, 3))[..., None]


def slerp(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spherical interpolation of Gaussian noise a, b [...] (Shoemake 1985): float32 [N, ...].

    `weights` [N] are 0 at a and 1 at b.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    weights = np.asarray(weights, np.float64).reshape(-1, *[1] * a.ndim)
    cosine = np.clip(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)
    angle = np.arccos(cosine)
    if np.sin(angle) < 1e-6:  # the same direction, or opposite ones
        return ((1 - weights) * a + weights * b).astype(np.float32)
    arc = np.sin((1 - weights) * angle) * a + np.sin(weights * angle) * b
    return (arc / np.sin(angle)).astype(np.float32)
