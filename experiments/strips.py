"""Image strips in results.json, which let a figure be plotted from the results alone: a row of images as base64 PNG."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure, FigureBase
from PIL import Image


def encode(images: np.ndarray) -> str:
    """Greyscale images uint8 [N, H, W, 1] to a base64 PNG [H, N W]."""
    side_by_side = np.concatenate(list(images[..., 0]), axis=1)
    png = io.BytesIO()
    Image.fromarray(side_by_side).save(png, "png")
    return base64.b64encode(png.getvalue()).decode()


def decode(strip: str) -> np.ndarray:
    """A base64 PNG to an image uint8 [H, N W]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(strip))))


def plot_grid(strips: list[dict[str, str]], names: list[str], width: float) -> Figure:
    """A figure of image strips: a named row for each dict, a titled column for each key; `width` in inches."""
    figure = plt.figure(figsize=(width, grid_height(strips, width)), layout="constrained")
    plot_in(figure, strips, names)
    return figure


def grid_height(strips: list[dict[str, str]], width: float) -> float:
    """The height of `plot_grid`'s rows in inches, for its width in inches."""
    images = [decode(strip) for strip in strips[0].values()]
    return (0.88 * width * len(images[0]) / sum(image.shape[1] for image in images) + 0.05) * len(strips) + 0.3


def plot_in(figure: FigureBase, strips: list[dict[str, str]], names: list[str]) -> None:
    """`plot_grid` in a subfigure."""
    columns = list(strips[0])
    axes = figure.subplots(len(strips), len(columns), squeeze=False, gridspec_kw={"hspace": 0.02, "wspace": 0.02})
    for row, name, row_axes in zip(strips, names, axes):
        for axis, column in zip(row_axes, columns):
            axis.imshow(decode(row[column]), cmap="gray")
            axis.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for axis, column in zip(axes[0], columns):
        axis.set_title(column, fontsize=9)
