"""Shapes that pictures are trained in so that little of them is cut off: buckets, each of the pictures of one shape.

A batch is of one bucket. As NovelAI trained (2022, "aspect ratio bucketing"), and Podell 2023, section 2.3.
"""

import numpy as np

ELONGATED = 2.0  # the longer side by the shorter, at most
Size = tuple[int, int]  # height, width


def bucket_sizes(image_size: int, step: int) -> tuple[Size, ...]:
    """All shapes of image_size^2 pixels or fewer whose sides are multiples of `step`, none larger beside it, from the
    highest to the widest.

    >>> bucket_sizes(512, 64)
    ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))
    """
    sides = range(step, int(image_size * ELONGATED**0.5) + 1, step)
    wide = {(side, image_size**2 // side // step * step) for side in sides if side <= image_size}
    kept = {(h, w) for h, w in wide if h <= w <= ELONGATED * h}
    return tuple(sorted(kept | {(w, h) for h, w in kept}, key=lambda size: size[1] / size[0]))


def nearest(sizes: tuple[Size, ...], shapes: np.ndarray) -> np.ndarray:
    """For each of the shapes [N, 2] the number of the size whose proportions are nearest to its own, int64 [N]."""
    own, theirs = (np.log(both[:, 0] / both[:, 1]) for both in (np.asarray(shapes, float), np.array(sizes, float)))
    return np.abs(own[:, None] - theirs).argmin(axis=1)
