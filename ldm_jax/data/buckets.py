"""Aspect ratio buckets (NovelAI 2022; Podell 2023, section 2.3): each batch is of images of one shape."""

import numpy as np

ELONGATED = 2.0  # the largest ratio of the longer side to the shorter
Size = tuple[int, int]  # height, width


def bucket_sizes(image_size: int, step: int) -> tuple[Size, ...]:
    """The shapes of buckets, from portrait to landscape: at most image_size^2 pixels, both sides multiples of `step`
    and as large as possible.

    >>> bucket_sizes(512, 64)
    ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))
    """
    sides = range(step, int(image_size * ELONGATED**0.5) + 1, step)
    wide = {(side, image_size**2 // side // step * step) for side in sides if side <= image_size}
    kept = {(h, w) for h, w in wide if h <= w <= ELONGATED * h}
    return tuple(sorted(kept | {(w, h) for h, w in kept}, key=lambda size: size[1] / size[0]))


def nearest(sizes: tuple[Size, ...], shapes: np.ndarray) -> np.ndarray:
    """int64 [N]: for image shapes [N, 2], the index of the size with the nearest aspect ratio (by its logarithm)."""
    image, bucket = (np.log(hw[:, 0] / hw[:, 1]) for hw in (np.asarray(shapes, float), np.array(sizes, float)))
    return np.abs(image[:, None] - bucket).argmin(axis=1)
