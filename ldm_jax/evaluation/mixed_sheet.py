"""Samples among test images in random order: a sheet for the eye, and the same with the test images faded."""

from pathlib import Path

import numpy as np

from ldm_jax.sampling.image_grids import enlargement, grid, save_png

NUM = 100  # samples, and as many test images
COLUMNS = 20
FADED = 0.8  # the share of white on a test image in the answer
MIXED, ANSWER = "mixed.png", "mixed_answer.png"


def write_mixed_sheet(workdir: Path, samples: np.ndarray, real: np.ndarray, seed: int) -> None:
    """Writes mixed.png and mixed_answer.png to a run folder: the first samples and real images, none selected.

    Both are uint8 [N, H, W, 1 or 3] of one size; `seed` shuffles them.
    """
    n = min(NUM, len(samples), len(real))
    images, order = np.concatenate([samples[:n], real[:n]]), np.random.default_rng(seed).permutation(2 * n)
    faded = np.where((np.arange(2 * n) < n)[:, None, None, None], images, _fade(images))
    layout = {"columns": min(COLUMNS, 2 * n), "scale": min(2, enlargement(max(images.shape[1:3])))}
    for name, shown in ((MIXED, images), (ANSWER, faded)):
        save_png(grid(shown[order], **layout), workdir / name)


def _fade(images: np.ndarray) -> np.ndarray:
    """Images mixed with white, uint8."""
    return np.round((1 - FADED) * images + 255 * FADED).astype(np.uint8)
