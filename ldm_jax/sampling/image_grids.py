"""Pictures for people: sample grids, reconstructions, the denoising film. Pillow only.

Images are uint8 [N, H, W, 1 or 3]; small ones are enlarged by whole factors, every pixel a clean square. A PNG carries
its recipe (how to make it again) as JSON in a text chunk.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ldm_jax.errors import InputError
from ldm_jax.runtime.files import atomic

CELL = 84  # pixels: about the size at which an image in a grid is pleasant to look at
GAP = 2  # pixels between images
PAPER, INK = 255, 64  # greys, so that a grid of grey images is a grey picture: a third of the size
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
        canvas.paste(
            _picture(image, (width, height)), (margin + GAP + column * (width + GAP), GAP + row * (height + GAP))
        )
    return canvas


def sample_grid(
    images: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] | None = None, *, side: int = 10
) -> Image.Image:
    """The picture of a run: one labelled row for each class, or the first side * side images, where there are no labels
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


def save_png(picture: Image.Image, path: Path, recipe: dict[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with the recipe in it."""
    text = PngImagePlugin.PngInfo()
    if recipe is not None:
        text.add_text(RECIPE, json.dumps(recipe))
    with atomic(Path(path)) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text, optimize=True)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a PNG written by `save_png`.

    Raises:
        InputError: no such file, not a PNG, or one without a recipe.
    """
    try:
        with Image.open(path) as picture:
            text = getattr(picture, "text", {})  # of a PNG only
    except OSError as error:  # Pillow's UnidentifiedImageError is one
        raise InputError(f"{path}: cannot be read as a picture: {error.strerror or 'not an image file'}") from error
    try:
        return json.loads(text[RECIPE])
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: this picture carries no recipe; those that ldm_jax.sample writes do") from error


def save_denoising_gif(
    frames: np.ndarray, path: Path, *, columns: int | None = None, frame_ms: int = 90, hold_ms: int = 2500
) -> None:
    """The denoising as an endless film whose last frame stays for a while.

    Args:
        frames: uint8 [F, N, H, W, 1 or 3]: what the model took N samples to be, at F moments, noise first.
        path: of the GIF.
        columns: samples in a row; default: about as many as rows.
        frame_ms, hold_ms: how long a frame and the last frame are seen.
    """
    if frames.ndim != 5 or len(frames) == 0:
        raise InputError(f"a film needs frames [F, N, H, W, 1 or 3], got {list(frames.shape)}")
    columns = columns or int(np.ceil(np.sqrt(frames.shape[1])))
    pictures = [grid(images, columns=columns) for images in frames]
    durations = [frame_ms] * (len(pictures) - 1) + [hold_ms]
    with atomic(Path(path)) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
            optimize=True,
        )


def _picture(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    plain = image[..., 0] if image.shape[-1] == 1 else image
    return Image.fromarray(plain).resize(size, Image.Resampling.NEAREST)


def check_images(images: np.ndarray, name: str) -> None:
    """Raise `InputError` unless `images` is uint8 [N, H, W, 1 or 3] with N >= 1; `name` says which images they are."""
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] not in (1, 3)
    ):
        given = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"{name} must be a uint8 array [N, H, W, 1 or 3], got {given}")
    if images.size == 0:
        raise InputError(f"{name} must hold at least one image, got {list(images.shape)}")
