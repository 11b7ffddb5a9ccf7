"""Conditioning by concatenation: how images are degraded, and the channels that are made of that."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import initial_latents, low_resolution_noise, sample_keys, split_keys
from ldm_jax.models.concat_conditioning import (
    Inpainting,
    LowResolution,
    NoiseAugmentation,
    Segmentation,
    concat_arguments,
    random_boxes,
)
from ldm_jax.models.first_stage import FirstStage

IMAGES, _ = tiny.pictures(16)
KEYS = jax.random.split(jax.random.key(0), 16)
PIXELS = FirstStage(None)
PARAMS = {"first_stage": {}, "shift": jnp.zeros(1), "scale": jnp.ones(1)}


def test_low_resolution_by_hand():
    concat = LowResolution(factor=2, channels=1)
    flat = np.full((1, 8, 8, 1), 200, np.uint8)
    degraded = concat.degrade({"x": flat}, KEYS[:1])
    assert degraded["small"].shape == (1, 4, 4, 1)
    assert (degraded["small"] == 200).all()
    np.testing.assert_allclose(concat.encode(PIXELS, PARAMS, degraded, (4, 4)), 200 / 127.5 - 1, rtol=1e-6)
    assert concat.encode(PIXELS, PARAMS, degraded, (8, 8)).shape == (1, 8, 8, 1)


def test_low_resolution_is_that_of_pillow():
    small = LowResolution(factor=2, channels=1).degrade({"x": IMAGES}, KEYS)["small"]
    pillow = [Image.fromarray(x[..., 0]).resize((4, 4), Image.Resampling.BICUBIC) for x in IMAGES]
    assert np.abs(np.asarray(small[..., 0], int) - np.stack([np.asarray(x, int) for x in pillow])).max() <= 1


@dataclass(frozen=True)
class Halving:
    """An autoencoder that drops every other pixel."""

    downsampling = 2

    def apply(self, variables, x, method):
        return x[:, ::2, ::2]


def test_the_channels_of_inpainting_are_the_mask_and_the_masked_latents():
    concat = Inpainting(latent_channels=1)
    mask = np.zeros((1, 8, 8, 1), np.uint8)
    mask[:, 4:, 2:] = 1
    params = PARAMS | {"shift": jnp.array([0.5]), "scale": jnp.array([2.0])}
    channels = concat.encode(FirstStage(Halving()), params, {"x": IMAGES[:1], "mask": mask}, (4, 4))
    expected = np.where(mask[0, ::2, ::2, 0], 0, IMAGES[0, ::2, ::2, 0] / 127.5 - 1)
    np.testing.assert_array_equal(channels[0, ..., 0], mask[0, ::2, ::2, 0])
    np.testing.assert_allclose(channels[0, ..., 1], (expected - 0.5) * 2, atol=1e-6)
    assert concat.channels == 2


def test_the_channels_of_inpainting_do_not_depend_on_the_masked_part():
    concat = Inpainting(latent_channels=1)
    degraded = concat.degrade({"x": IMAGES}, KEYS)
    changed = degraded | {"x": np.where(degraded["mask"] == 1, 255 - IMAGES, IMAGES)}
    channels, same = (concat.encode(PIXELS, PARAMS, inputs, (8, 8)) for inputs in (degraded, changed))
    np.testing.assert_array_equal(channels, same)
    assert (np.asarray(changed["x"]) != IMAGES).any()


def test_random_boxes_mask_a_part_of_every_image_and_differ():
    masks = np.asarray(jax.vmap(lambda key: random_boxes(key, (28, 28)))(jax.random.split(jax.random.key(1), 500)))
    share = masks.mean((1, 2, 3))
    assert masks.shape == (500, 28, 28, 1)
    assert 0.03 < share.min() < 0.2
    assert 0.6 < share.max() < 1
    assert len({mask.tobytes() for mask in masks}) > 490
    assert (masks.mean(0) > 0.02).all()  # also in the corners


def test_the_channels_of_segmentation_are_the_fractions_of_the_classes():
    concat = Segmentation(num_segments=3)
    segments = np.zeros((1, 4, 4, 1), np.uint8)
    segments[0, :2, :2] = 2
    segments[0, 2:, 2:] = 1
    channels = concat.encode(PIXELS, PARAMS, concat.degrade({"segments": segments}, KEYS[:1]), (2, 2))
    np.testing.assert_allclose(channels.sum(-1), 1, rtol=1e-6)
    assert channels[0].argmax(-1).tolist() == [[2, 0], [0, 1]]


def test_noise_augmentation_by_hand():
    """alpha small + sigma noise, and the level as the class label; level 0 of this process is clean."""
    small, keys = np.full((1, 4, 6, 3), 0.5, np.float32).repeat(2, 0), sample_keys(np.uint32(3), np.arange(2))
    augmentation = NoiseAugmentation(Process.variance_preserving(np.array([1.0, 0.36])), 1)
    noise = low_resolution_noise(keys, small.shape[1:])
    clean, arguments = augmentation.apply(small, np.zeros(2, int), noise)
    np.testing.assert_array_equal(clean, small)
    assert arguments["class_labels"].tolist() == [0, 0]
    noised, _ = augmentation.apply(small, np.ones(2, int), noise)
    np.testing.assert_allclose(noised, 0.6 * small + 0.8 * noise, atol=1e-6)
    initial = initial_latents(keys, small.shape[1:])  # of the same sample, another stream
    assert abs(np.corrcoef(np.ravel(noise), np.ravel(initial))[0, 1]) < 0.5


@pytest.mark.parametrize("noise", [None, NoiseAugmentation(Process.variance_preserving(np.array([0.9, 0.5])), 1)])
def test_the_arguments_in_training(noise):
    """Degraded, encoded and, of an upscaler, noised at levels of their own."""
    concat = LowResolution(2, 1, noise)
    arguments = concat_arguments(concat, PIXELS, PARAMS, {"x": jnp.asarray(IMAGES)}, KEYS, (8, 8))
    plain = concat.encode(PIXELS, PARAMS, concat.degrade({"x": IMAGES}, KEYS), (8, 8))
    if noise is None:
        assert arguments.keys() == {"concat"}
        np.testing.assert_array_equal(arguments["concat"], plain)
        return
    assert set(arguments["class_labels"].tolist()) == {0, 1}
    _, key_noise = split_keys(KEYS, 2)
    noised, level = noise.augment(plain, key_noise)
    np.testing.assert_array_equal(arguments["concat"], noised)
    np.testing.assert_array_equal(arguments["class_labels"], level["class_labels"])
    assert (np.asarray(noised) != plain).any()
