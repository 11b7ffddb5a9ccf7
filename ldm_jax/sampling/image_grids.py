"""Image grids as PNG, and denoising as an animated GIF.

Images are uint8 [N, H, W, 1 or 3]; small ones are enlarged by whole factors. A PNG carries the recipe of its samples as
JSON in a text chunk.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from ldm_jax.errors import InputError
from ldm_jax.runtime.files import atomic
from ldm_jax.sampling.grid_text import draw_text, layout, length

CELL = 84  # pixels: the side that small images are enlarged to, about
GAP = 2  # pixels between images
LABEL_IMAGES = 4  # widest label, in images, but
LABEL_EMS = (10, 20)  # at least and at most this many times the font's size: about 20 and 40 characters
PAPER, INK = 255, 64  # grey levels of the background and the text
RECIPE = "recipe"  # key of the PNG text chunk
FRAME_MS, LAST_FRAME_MS = 90, 2500  # of denoising.gif


def enlargement(side: int) -> int:
    """The whole factor that brings `side` pixels nearest to `CELL`: 3 for 28, 1 from 57 on."""
    return max(1, round(CELL / side))


def grid(
    images: np.ndarray, *, columns: int, row_labels: Sequence[str] | None = None, scale: int | None = None
) -> Image.Image:
    """A grid of images uint8 [N, H, W, 1 or 3], row by row, enlarged by `scale` (None: by `enlargement`).

    `row_labels` has one text for each row, None for no labels; the last row may be short. Texts wider than 4 images or
    about 40 characters are cut.
    """
    check_images(images, "the images of a grid")
    rows = -(-len(images) // columns)
    if row_labels is not None and len(row_labels) != rows:
        given = f"got {len(row_labels)} labels"
        raise InputError(f"a grid of {len(images)} images in {columns} columns has {rows} rows, {given}")
    scale = enlargement(max(images.shape[1:3])) if scale is None else scale
    height, width = images.shape[1] * scale, images.shape[2] * scale
    size = max(12, min(20, height // 5))
    widest = size * min(LABEL_EMS[1], max(LABEL_EMS[0], LABEL_IMAGES * (width + GAP) / size))
    texts = [layout(text, size, widest) for text in row_labels or ()]
    margin = 0 if row_labels is None else 2 * GAP + 12 + round(max(map(length, texts)))
    mode, paper, ink = ("L", PAPER, INK) if images.shape[-1] == 1 else ("RGB", (PAPER,) * 3, (INK,) * 3)
    canvas = Image.new(mode, (margin + columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), paper)
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(texts):
        draw_text(draw, margin - 12, GAP + row * (height + GAP) + height // 2, text, ink)
    for i, image in enumerate(images[..., 0] if mode == "L" else images):
        row, column = divmod(i, columns)
        enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (margin + GAP + column * (width + GAP), GAP + row * (height + GAP)))
    return canvas


def sample_grid(
    images: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] | None = None, *, side: int = 10
) -> Image.Image:
    """The grid of samples uint8 [N, H, W, 1 or 3]: a row for each class, at most `side` rows and columns.

    `labels` int [N] may be -1 or None, for none, and `class_names` None, for indices. Of more classes than rows, evenly
    spaced ones are used; without labels, or with hardly two images a class, the first images.
    """
    classes = [] if labels is None else [int(label) for label in np.unique(labels) if label >= 0]
    if not classes or (len(classes) > side and len(images) < 2 * len(classes)):
        return grid(images[: side * side], columns=min(side, len(images)))
    if len(classes) > side:
        classes = [classes[i] for i in np.linspace(0, len(classes) - 1, side).round().astype(int)]
    of_class = [images[labels == label][:side] for label in classes]
    columns = min(map(len, of_class))
    names = [str(label) if class_names is None else class_names[label] for label in classes]
    return grid(np.concatenate([row[:columns] for row in of_class]), columns=columns, row_labels=names)


def comparison(rows: Mapping[str, np.ndarray], *, columns: int = 10) -> Image.Image:
    """The grid of rows of images uint8 [N, H, W, 1 or 3], image k below image k; raises InputError if shapes differ."""
    shape = next(iter(rows.values())).shape
    if any(images.shape != shape for images in rows.values()):
        shapes = " and ".join(str(list(images.shape)) for images in rows.values())
        raise InputError(f"the images of {' and '.join(rows)} must be of one shape, got {shapes}")
    columns = min(columns, shape[0])
    groups = shape[0] // columns
    parts = [images[: groups * columns].reshape(groups, columns, *shape[1:]) for images in rows.values()]
    return grid(np.stack(parts, axis=1).reshape(-1, *shape[1:]), columns=columns, row_labels=[*rows] * groups)


def save_png(image: Image.Image, path: Path, recipe: dict[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with the recipe in it."""
    text = PngImagePlugin.PngInfo()
    if recipe is not None:
        text.add_text(RECIPE, json.dumps(recipe))
    with atomic(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=text, optimize=True)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a PNG written by `save_png`, any JSON object; raises InputError for other files."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})  # of a PNG only
    except OSError as error:  # Pillow's UnidentifiedImageError is one
        raise InputError(f"{path}: cannot be read as an image: {error.strerror or 'not an image file'}") from error
    try:
        recipe = json.loads(text.get(RECIPE, "null"))
    except json.JSONDecodeError:
        recipe = None
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: this image has no recipe; those that ldm_jax.sample writes have one")
    return recipe


def save_denoising_gif(frames: np.ndarray, path: Path) -> None:
    """Writes the trajectory of N samples, uint8 [F, N, H, W, 1 or 3], noise first, as a GIF that loops."""
    if frames.ndim != 5 or len(frames) == 0:
        raise InputError(f"denoising.gif needs frames [F, N, H, W, 1 or 3], got {list(frames.shape)}")
    first, *rest = [grid(images, columns=int(np.ceil(np.sqrt(len(images))))) for images in frames]
    durations = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
    with atomic(Path(path)) as temporary:
        first.save(
            temporary, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=True
        )


def check_images(images: np.ndarray, name: str) -> None:
    """Raises InputError unless `images` is uint8 [N, H, W, 1 or 3] with N >= 1; `name` says which images they are."""
    if not isinstance(images, np.ndarray):
        raise InputError(f"{name} must be a uint8 array [N, H, W, 1 or 3], got {type(images).__name__}")
    given = f"{images.dtype} {list(images.shape)}"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(f"{name} must be a uint8 array [N, H, W, 1 or 3], got {given}")
    if images.size == 0:
        raise InputError(f"{name} must hold at least one image, got {given}")
