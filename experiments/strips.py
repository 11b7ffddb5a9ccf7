"""Pictures in results.json, so that a figure can be drawn of the results alone: a row of them as a PNG in base64."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
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
    columns = list(strips[0])
    pictures = [[unpacked(line[column]) for column in columns] for line in strips]
    height, long = pictures[0][0].shape[0], sum(picture.shape[1] for picture in pictures[0])
    line_height = 0.85 * width * height / long + 0.05
    figure, axes = plt.subplots(
        len(strips), len(columns), figsize=(width, line_height * len(strips) + 0.4), squeeze=False
    )
    for line, name, axes_of_line in zip(pictures, names, axes):
        for axis, picture in zip(axes_of_line, line):
            axis.imshow(picture, cmap="gray")
            axis.set(xticks=[], yticks=[])
        axes_of_line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    if len(columns) > 1:
        for axis, column in zip(axes[0], columns):
            axis.set_title(column, fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure
