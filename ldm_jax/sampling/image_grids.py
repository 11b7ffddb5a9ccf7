"""Image grids: samples, reconstructions, the animation of denoising. Images are uint8 [N, H, W, 1 or 3].

Small images are enlarged by whole factors. A PNG carries its recipe as JSON in a text chunk.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ldm_jax.errors import InputError
from ldm_jax.runtime.files import atomic

CELL = 84  # pixels: about the side of an image in a grid
GAP = 2  # pixels between images
PAPER, INK = 255, 64  # grey levels: a grid of greyscale images is a greyscale PNG, a third of the size
RECIPE = "recipe"  # key of the PNG text chunk


def enlargement(side: int) -> int:
    """The whole factor that brings `side` pixels nearest to `CELL`: 3 for 28, 1 from 57 on."""
    return max(1, round(CELL / side))


def grid(
    images: np.ndarray, *, columns: int, row_labels: Sequence[str] | None = None, scale: int | None = None
) -> Image.Image:
    """Images in rows of `columns`, left to right and top to bottom, with a text before each row.

    Args:
        images: uint8 [N, H, W, 1 or 3]; the last row may be short.
        columns: images in a row.
        row_labels: one text for each row, or None for no texts.
        scale: factor of enlargement; default: by `enlargement`.
    """
    check_images(images, "the images of a grid")
    rows = -(-len(images) // columns)
    if row_labels is not None and len(row_labels) != rows:
        raise InputError(
            f"a grid of {len(images)} images in {columns} columns has {rows} rows, got {len(row_labels)} labels"
        )
    scale = enlargement(max(images.shape[1:3])) if scale is None else scale
    height, width = images.shape[1] * scale, images.shape[2] * scale
    font = ImageFont.load_default(size=max(12, min(20, height // 5)))
    margin = 0 if row_labels is None else 2 * GAP + 12 + round(max(font.getlength(text) for text in row_labels))
    mode, paper, ink = ("L", PAPER, INK) if images.shape[-1] == 1 else ("RGB", (PAPER,) * 3, (INK,) * 3)
    canvas = Image.new(mode, (margin + columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), paper)
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(row_labels or ()):
        draw.text((margin - 12, GAP + row * (height + GAP) + height // 2), text, fill=ink, font=font, anchor="rm")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        plain = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        place = margin + GAP + column * (width + GAP), GAP + row * (height + GAP)
        canvas.paste(plain.resize((width, height), Image.Resampling.NEAREST), place)
    return canvas


def sample_grid(
    images: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] | None = None, *, side: int = 10
) -> Image.Image:
    """A sample grid: a labelled row for each class, or the first side * side images, where there are no labels
    or hardly two images of any.

    Args:
        images: uint8 [N, H, W, 1 or 3].
        labels: int [N], -1 = none; None = no labels.
        class_names: the text for each label; default: its number.
        side: rows and columns at most. Of more classes, `side` evenly spaced ones are shown.
    """
    classes = [] if labels is None else [int(label) for label in np.unique(labels) if label >= 0]
    if not classes or (len(classes) > side and len(images) < 2 * len(classes)):
        return grid(images[: side * side], columns=min(side, len(images)))
    if len(classes) > side:
        classes = [classes[i] for i in np.linspace(0, len(classes) - 1, side).round().astype(int)]
    of_class = {label: images[labels == label][:side] for label in classes}
    columns = min(len(row) for row in of_class.values())
    names = [str(label) if class_names is None else class_names[label] for label in classes]
    return grid(np.concatenate([row[:columns] for row in of_class.values()]), columns=columns, row_labels=names)


def reconstruction_strip(originals: np.ndarray, reconstructions: np.ndarray, *, columns: int = 10) -> Image.Image:
    """Pairs of rows: originals above what the autoencoder makes of them; two arrays uint8 [N, H, W, 1 or 3]."""
    check_images(originals, "the originals")
    if originals.shape != reconstructions.shape:
        shapes = f"{list(originals.shape)} and {list(reconstructions.shape)}"
        raise InputError(f"originals and reconstructions must be of one shape, got {shapes}")
    return comparison({"original": originals, "decoded": reconstructions}, columns=columns)


def comparison(rows: Mapping[str, np.ndarray], *, columns: int = 10) -> Image.Image:
    """Groups of rows, one of each name, in which image k stands above image k: arrays uint8 [N, H, W, 1 or 3]."""
    shape = next(iter(rows.values())).shape
    columns = min(columns, shape[0])
    groups = shape[0] // columns
    parts = [images[: groups * columns].reshape(groups, columns, *shape[1:]) for images in rows.values()]
    interleaved = np.stack(parts, axis=1).reshape(-1, *shape[1:])
    return grid(interleaved, columns=columns, row_labels=[*rows] * groups)


def save_png(image: Image.Image, path: Path, recipe: dict[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with the recipe in it."""
    text = PngImagePlugin.PngInfo()
    if recipe is not None:
        text.add_text(RECIPE, json.dumps(recipe))
    with atomic(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=text, optimize=True)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a PNG written by `save_png`.

    Raises:
        InputError: no such file, not a PNG, or one without a recipe.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})  # of a PNG only
    except OSError as error:  # Pillow's UnidentifiedImageError is one
        raise InputError(f"{path}: cannot be read as an image: {error.strerror or 'not an image file'}") from error
    try:
        return json.loads(text[RECIPE])
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: this image has no recipe; every samples.png of ldm_jax has one") from error


def save_denoising_gif(
    frames: np.ndarray, path: Path, *, columns: int | None = None, frame_ms: int = 90, hold_ms: int = 2500
) -> None:
    """Writes a looping GIF of denoising, whose last frame is held.

    Args:
        frames: uint8 [F, N, H, W, 1 or 3]: the decoded z0_hat of N samples at F steps, noise first.
        path: of the GIF.
        columns: samples in a row; default: about as many as rows.
        frame_ms, hold_ms: duration of a frame and of the last frame, in milliseconds.
    """
    if frames.ndim != 5 or len(frames) == 0:
        raise InputError(f"denoising.gif needs frames [F, N, H, W, 1 or 3], got {list(frames.shape)}")
    columns = columns or int(np.ceil(np.sqrt(frames.shape[1])))
    grids = [grid(images, columns=columns) for images in frames]
    durations = [frame_ms] * (len(grids) - 1) + [hold_ms]
    with atomic(Path(path)) as temporary:
        options = {"format": "GIF", "save_all": True, "loop": 0, "optimize": True}
        grids[0].save(temporary, append_images=grids[1:], duration=durations, **options)


def check_images(images: np.ndarray, name: str) -> None:
    """Raises InputError unless `images` is uint8 [N, H, W, 1 or 3] with N >= 1; `name` says which images they are."""
    if not isinstance(images, np.ndarray):
        raise InputError(f"{name} must be a uint8 array [N, H, W, 1 or 3], got {type(images).__name__}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(f"{name} must be a uint8 array [N, H, W, 1 or 3], got {images.dtype} {list(images.shape)}")
    if images.size == 0:
        raise InputError(f"{name} must hold at least one image, got {list(images.shape)}")
