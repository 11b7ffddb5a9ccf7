import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.pixels import flip_images, to_pixels, to_uint8


def test_to_pixels_by_hand():
    x = to_pixels(np.array([0, 51, 127, 128, 255], np.uint8))
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, [-1.0, -0.6, -1 / 255, 1 / 255, 1.0], atol=1e-7)


def test_round_trip_of_every_level():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for convert in (lambda u: to_uint8(to_pixels(u)), jax.jit(lambda u: to_uint8(to_pixels(u)))):
        back = convert(levels)
        assert back.dtype == jnp.uint8
        np.testing.assert_array_equal(back, levels)


def test_to_uint8_rounds_and_clips():
    # 0 is level 127.5, which goes to the even 128; -0.997 is 0.38, -0.995 is 0.64.
    x = jnp.array([-1.0, -3.0, 1.0, 3.0, 0.0, -0.997, -0.995], jnp.float32)
    np.testing.assert_array_equal(to_uint8(x), [0, 0, 255, 255, 128, 0, 1])


def test_flip_is_decided_by_each_examples_own_key():
    keys = jax.jit(jax.vmap(jax.random.key))(jnp.arange(200))
    x = np.random.default_rng(0).normal(size=(200, 3, 4, 2)).astype(np.float32)
    flipped = np.asarray(jax.jit(flip_images)(x, keys))
    mirrored = np.array([(a == b[:, ::-1]).all() for a, b in zip(flipped, x)])
    np.testing.assert_array_equal(flipped[~mirrored], x[~mirrored])
    assert 70 < mirrored.sum() < 130  # 100 give or take 7
    for k in (0, 1, 199):
        assert mirrored[k] == bool(jax.random.bernoulli(jax.random.key(k)))
    np.testing.assert_array_equal(
        jax.jit(flip_images)(x[5:9], keys[5:9]), flipped[5:9]
    )  # whatever else is in the batch
