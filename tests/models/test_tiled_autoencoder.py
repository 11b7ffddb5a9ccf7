"""Images through an autoencoder in tiles."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.first_stage import FirstStage
from ldm_jax.models.tiled_autoencoder import in_tiles


def doubled(x):
    return x.repeat(2, 1).repeat(2, 2)


def mean_doubled(x):
    return jnp.broadcast_to(x.mean((1, 2), keepdims=True), doubled(x).shape)


@pytest.mark.parametrize("height, width", [(4, 4), (3, 9), (16, 8), (7, 10), (13, 5)])
def test_tiles_of_what_looks_at_no_neighbours_are_the_whole(height, width):
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    np.testing.assert_allclose(in_tiles(doubled, jnp.asarray(x), 4, 8), doubled(x), rtol=1e-6)


def test_tiles_fade_into_each_other_by_hand():
    """Two tiles of 4 of which the second begins a quarter earlier, each its mean: 1, and 4 where the rest is."""
    x = jnp.asarray([1, 1, 1, 1, 5, 5], jnp.float32)
    means = 1, 11 / 3
    row = np.array([means[0]] * 6 + [means[0], sum(means) / 2] + [means[1]] * 4)
    np.testing.assert_allclose(in_tiles(mean_doubled, x[None, None, :, None], 4, 8)[0, :, :, 0], [row] * 2, rtol=1e-6)
    np.testing.assert_allclose(in_tiles(mean_doubled, x[None, :, None, None], 4, 8)[0, :, 0, 0], row, rtol=1e-6)


def test_at_most_four_shapes_are_compiled():
    shapes = []

    def network(x):
        shapes.append(x.shape)
        return doubled(x)

    in_tiles(network, jnp.zeros((1, 11, 20, 1)), 4, 8)
    assert sorted(shapes) == [(1, 2, 2, 1), (1, 2, 4, 1), (1, 4, 2, 1), (1, 4, 4, 1)]


@dataclass(frozen=True)
class Halving:
    """An autoencoder that drops every other pixel, and notes the sides that it is applied to."""

    sides: list = field(compare=False)
    downsampling = 2

    def apply(self, variables, x, method):
        self.sides.append(max(x.shape[1:3]))
        return variables["params"] * (x[:, ::2, ::2] if method == "encode" else doubled(x))


def test_a_first_stage_in_tiles():
    """Tiles of 8 pixels: the encoder is applied to these, the decoder to 4 latents."""
    sides = []
    first_stage = FirstStage(Halving(sides), sample_size=8, tiled=True)
    x = jnp.ones((1, 20, 12, 3))
    np.testing.assert_array_equal(first_stage.decode(5, first_stage.encode(3, x)), 15 * x)
    assert (max(sides), sides[0], sides[-1] <= 4) == (8, 8, True)
    with pytest.raises(ValueError, match="a tile of 12 pixels must be a multiple of 4 x 2"):
        FirstStage(Halving(sides), sample_size=12, tiled=True)
