"""Moved and resized pictures by hand."""

from functools import partial

import jax
import numpy as np
import pytest

from ldm_jax.data.augmentation import move_and_zoom

KEYS = jax.random.split(jax.random.key(0), 64)
RAMP = np.arange(35, dtype=np.float32).reshape(1, 5, 7, 1)


def augment(x, keys, max_shift, max_zoom):
    return np.asarray(jax.jit(partial(move_and_zoom, max_shift=max_shift, max_zoom=max_zoom))(x, keys))


def test_a_shift_moves_whole_pixels_and_goes_on_with_the_edge():
    """Each of the 64 is one of the nine shifts by up to a pixel, and all nine come up."""
    padded = np.pad(RAMP[0], ((1, 1), (1, 1), (0, 0)), mode="edge")
    shifts = [padded[i : i + 5, j : j + 7] for i in range(3) for j in range(3)]
    moved = augment(np.repeat(RAMP, 64, 0), KEYS, 1, 0.0)
    which = [[np.allclose(picture, shift, atol=1e-5) for shift in shifts] for picture in moved]
    assert (np.sum(which, axis=1) == 1).all()
    assert np.any(which, axis=0).all()


def test_a_zoom_is_about_the_centre_and_linear():
    """Of a ramp around 0 the middle keeps its value and all slopes change by one factor, up to the edge."""
    ramp = np.arange(-3, 4, dtype=np.float32)[None, :, None, None] * np.ones((64, 1, 7, 1), np.float32)
    zoomed = augment(ramp, KEYS, 0, 0.5)
    np.testing.assert_allclose(zoomed[:, 3], 0, atol=1e-5)
    slope = zoomed[:, 4]
    np.testing.assert_allclose(zoomed[:, 2], -slope, atol=1e-5)
    np.testing.assert_allclose(zoomed[:, 6], np.minimum(3 * slope, 3), atol=1e-4)
    assert 1 / 1.5 - 1e-4 <= slope.min() < 0.75 and 1.6 < slope.max() <= 2 + 1e-4


def test_each_picture_goes_by_its_own_key():
    x = np.random.default_rng(0).normal(size=(64, 5, 7, 3)).astype(np.float32)
    every = augment(x, KEYS, 2, 0.2)
    np.testing.assert_allclose(augment(x[10:12], KEYS[10:12], 2, 0.2), every[10:12], atol=1e-5)
    np.testing.assert_allclose(augment(x, KEYS, 0, 0.0), x, atol=1e-6)


@pytest.mark.parametrize("max_shift, max_zoom", [(-1, 0.0), (0, -0.1), (0, 1.0)])
def test_refused(max_shift, max_zoom):
    with pytest.raises(ValueError, match=rf"max_zoom in \[0, 1\); got {max_shift} and {max_zoom}"):
        move_and_zoom(RAMP, KEYS[:1], max_shift=max_shift, max_zoom=max_zoom)
