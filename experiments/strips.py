"""Pictures in results.json, so that a figure can be drawn of the results alone: a row of them as a PNG in base64."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure, FigureBase
from PIL import Image


def packed(images: np.ndarray) -> str:
    """Grey pictures uint8 [N, H, W, 1], side by side."""
    side_by_side = np.concatenate(list(images[..., 0]), axis=1)
    png = io.BytesIO()
    Image.fromarray(side_by_side).save(png, "png")
    return base64.b64encode(png.getvalue()).decode()


def unpacked(strip: str) -> np.ndarray:
    """uint8 [H, N W]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(strip))))


def grid(strips: list[dict[str, str]], names: list[str], width: float) -> Figure:
    """A line for each dict, with its name before it, a column for each key; `width` in inches."""
    figure = plt.figure(figsize=(width, height_of(strips, width)), layout="constrained")
    draw_in(figure, strips, names)
    return figure


def height_of(strips: list[dict[str, str]], width: float) -> float:
    """How high, in inches, the lines become that are so wide with their names."""
    pictures = [unpacked(strip) for strip in strips[0].values()]
    return (0.88 * width * len(pictures[0]) / sum(picture.shape[1] for picture in pictures) + 0.05) * len(strips) + 0.3


def draw_in(figure: FigureBase, strips: list[dict[str, str]], names: list[str]) -> None:
    """The same in a part of a figure."""
    columns = list(strips[0])
    axes = figure.subplots(len(strips), len(columns), squeeze=False, gridspec_kw={"hspace": 0.02, "wspace": 0.02})
    for line, name, axes_of_line in zip(strips, names, axes):
        for axis, column in zip(axes_of_line, columns):
            axis.imshow(unpacked(line[column]), cmap="gray")
            axis.set(xticks=[], yticks=[])
        axes_of_line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for axis, column in zip(axes[0], columns):
        axis.set_title(column, fontsize=9)
