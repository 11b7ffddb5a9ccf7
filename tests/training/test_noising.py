"""Noised latents of a batch: which latents, which side of an image, which noise level."""

from types import SimpleNamespace

import jax
import numpy as np
import tiny

from ldm_jax.diffusion.process import Process
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.training.noising import add_noise

PIXELS = FirstStage(None)
LATENTS = FirstStage(AutoencoderKL(in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(4, 4)))
PROCESS = Process.variance_preserving(np.array([0.99, 0.75, 0.5, 0.19]))
IMAGES, _ = tiny.pictures(16)
FROZEN = {"first_stage": {}, "shift": np.float32([0.25]), "scale": np.float32([2.0])}
BOTH_SIDES = np.stack([IMAGES, IMAGES[:, :, ::-1]], axis=1)


def keys(n=16, seed=0):
    return list(jax.random.split(jax.random.key(seed), (3, n)))


def noised(batch, t=None, first_stage=PIXELS, frozen=FROZEN, flip=False, seed=0):
    n, model = len(next(iter(batch.values()))), SimpleNamespace(first_stage=first_stage, process=PROCESS)
    return jax.device_get(add_noise(batch, frozen, keys(n, seed), t, model, flip=flip))


def test_pixels_are_scaled_and_noised_at_the_given_timesteps():
    t = np.arange(16) % 4
    example = noised({"x": IMAGES}, t)
    assert sorted(example) == ["eps", "t", "x", "z0", "z_t"]
    np.testing.assert_allclose(example["z0"], (IMAGES / 127.5 - 1 - 0.25) * 2, atol=1e-6)
    alpha, sigma = (table[t][:, None, None, None] for table in (PROCESS.alpha, PROCESS.sigma))
    np.testing.assert_allclose(example["z_t"], alpha * example["z0"] + sigma * example["eps"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(example["t"], t)
    assert abs(example["eps"].mean()) < 0.15 and abs(example["eps"].std() - 1) < 0.1


def test_each_example_takes_one_side_of_its_cached_latents():
    """Each by the key of its own: the second about half of them."""
    moments = np.repeat(BOTH_SIDES, 25, axis=0) / np.float32(127.5) - 1
    z0 = noised({"moments": moments})["z0"]
    first, second = (np.isclose(z0, (moments[:, side] - 0.25) * 2, atol=1e-6).all((1, 2, 3)) for side in (0, 1))
    assert (first ^ second).all() and abs(second.sum() - 200) < 4 * np.sqrt(400 / 4)


def test_timesteps_are_uniform_and_each_example_has_its_own_keys():
    many = {"x": np.repeat(IMAGES[:1], 400, 0)}
    example, other = noised(many), noised(many, seed=1)
    assert (np.abs(np.bincount(example["t"], minlength=4) - 100) < 4 * np.sqrt(400 * 3 / 16)).all()
    assert len(np.unique(example["eps"][:, 0, 0, 0])) == 400
    assert (example["t"] != other["t"]).any() and (example["eps"] != other["eps"]).any()


def test_images_and_their_segmentation_are_mirrored_together():
    """Each by the key of its own: about half of them."""
    segments = (IMAGES // 86).astype(np.uint8)
    batch = {"x": IMAGES[::4].repeat(25, 0), "segments": segments[::4].repeat(25, 0)}  # the ramps from left to right
    example = noised(batch, flip=True)
    mirrored = (example["x"] == batch["x"][:, :, ::-1]).all((1, 2, 3))
    assert (mirrored ^ (example["x"] == batch["x"]).all((1, 2, 3))).all() and 30 < mirrored.sum() < 70
    np.testing.assert_array_equal(example["segments"][mirrored], batch["segments"][mirrored][:, :, ::-1])
    np.testing.assert_array_equal(example["segments"][~mirrored], batch["segments"][~mirrored])
    np.testing.assert_allclose(example["z0"], (example["x"] / 127.5 - 1 - 0.25) * 2, atol=1e-6)
    assert "segments" not in noised({"x": batch["x"]}, flip=True)
    np.testing.assert_array_equal(noised(batch)["x"], batch["x"])


def test_cached_moments_are_sampled_and_no_image_is_read():
    """z0 = (mean + exp(logvar / 2) noise - shift) scale."""
    mean = np.random.default_rng(0).normal(size=(200, 1, 4, 4, 2))
    moments = np.concatenate([mean, np.full(mean.shape, 2 * np.log(0.1))], axis=-1).astype(np.float32)
    frozen = FROZEN | {"shift": np.float32([0.25, 0.0]), "scale": np.float32([2.0, 1.0])}
    example = noised({"moments": moments, "x": IMAGES}, first_stage=LATENTS, frozen=frozen)
    assert "x" not in example
    noise = (example["z0"] / frozen["scale"] + frozen["shift"] - mean[:, 0]) / 0.1
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    again = noised({"moments": moments}, first_stage=LATENTS, frozen=frozen)
    np.testing.assert_array_equal(again["z0"], example["z0"])
