"""Conditioning by concatenation: input channels of the denoiser that are made of an image (Rombach 2022, section 3.3).

Each type has `degrade`, from images to the inputs of a user, `encode`, from these to channels of the latents' size, and
the number of `channels`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.forward import q_sample
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import low_resolution_noise, split_keys
from ldm_jax.models.first_stage import FirstStage, to_latents
from ldm_jax.models.pixels import to_pixels, to_uint8

BOXES = 3  # of an inpainting mask in training, of a fifth to three fifths of the image's side each


@dataclass(frozen=True)
class NoiseAugmentation:
    """Noise augmentation of the low-resolution image, with the noise level as the class label (Ho 2022, section 4).

    As in diffusers' StableDiffusionUpscalePipeline (0.42.1).
    """

    process: Process
    max_noise_level: int

    def apply(self, small: Array, noise_level: Array, noise: Array) -> tuple[Array, dict]:
        """The noised image [B, h, w, C] and the denoiser's arguments; noise_level [B] in [0, max_noise_level]."""
        return q_sample(small, noise_level, noise, self.process), {"class_labels": noise_level}

    def augment(self, small: Array, keys: Array) -> tuple[Array, dict]:
        """`apply` with uniformly random noise levels, one for each of [B, h, w, C], for training; keys [B]."""
        key_level, key_noise = split_keys(keys, 2)
        level = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.max_noise_level + 1))(key_level)
        return self.apply(small, level, low_resolution_noise(key_noise, small.shape[1:]))


@dataclass(frozen=True)
class LowResolution:
    """Super-resolution: the image `factor` times smaller (bicubic, antialiased; Rombach 2022, section 4.4)."""

    factor: int
    channels: int
    noise: NoiseAugmentation | None = None

    def degrade(self, batch: dict, keys: Array) -> dict[str, Array]:
        """Images {"x" uint8 [B, H, W, C]} -> {"small" uint8 [B, H / factor, W / factor, C]}."""
        b, height, width, c = batch["x"].shape
        small = (b, height // self.factor, width // self.factor, c)
        return {"small": to_uint8(jax.image.resize(to_pixels(batch["x"]), small, "cubic"))}

    def encode(self, first_stage: FirstStage, params: Any, inputs: dict, size: tuple[int, int]) -> Array:
        """The low-resolution image resized to the latents, [B, *size, channels] float32."""
        x = to_pixels(inputs["small"])
        return jax.image.resize(x, (len(x), *size, self.channels), "cubic")


@dataclass(frozen=True)
class Inpainting:
    """Inpainting: the mask, and the latents of the image with the masked part grey (Rombach 2022, section 4.5).

    Channels, their order and the mask's downsampling (strided) are those of Stable Diffusion's inpainting models in
    diffusers. In training, random boxes are masked.
    """

    latent_channels: int

    noise = None

    @property
    def channels(self) -> int:
        """Of the mask and the latents."""
        return 1 + self.latent_channels

    def degrade(self, batch: dict, keys: Array) -> dict[str, Array]:
        """Images {"x" uint8 [B, H, W, C]} -> the same with "mask" uint8 [B, H, W, 1], 1 where it is to be sampled."""
        x = batch["x"]
        return {"x": x, "mask": jax.vmap(lambda key: random_boxes(key, x.shape[1:3]))(keys).astype(jnp.uint8)}

    def encode(self, first_stage: FirstStage, params: Any, inputs: dict, size: tuple[int, int]) -> Array:
        """The downsampled mask and the masked image's latents, [B, *size, channels] float32."""
        mask = inputs["mask"].astype(jnp.float32)
        moments = first_stage.encode(params["first_stage"], to_pixels(inputs["x"]) * (1 - mask))
        z = to_latents(first_stage.mode(moments), params["shift"], params["scale"])
        small = mask[:, :: mask.shape[1] // size[0], :: mask.shape[2] // size[1]]
        return jnp.concatenate([small, z], axis=-1)


@dataclass(frozen=True)
class Segmentation:
    """Semantic synthesis: a segmentation map, one channel a class (Rombach 2022, section 4.3.2)."""

    num_segments: int

    noise = None

    @property
    def channels(self) -> int:
        """One for each class."""
        return self.num_segments

    def degrade(self, batch: dict, keys: Array) -> dict[str, Array]:
        """The batch's "segments" uint8 [B, H, W, 1]."""
        return {"segments": batch["segments"]}

    def encode(self, first_stage: FirstStage, params: Any, inputs: dict, size: tuple[int, int]) -> Array:
        """The fraction of each class at each latent, [B, *size, num_segments] float32."""
        one_hot = jax.nn.one_hot(inputs["segments"][..., 0], self.num_segments)
        return jax.image.resize(one_hot, (len(one_hot), *size, self.num_segments), "linear")


ConcatConditioning = LowResolution | Inpainting | Segmentation


def concat_arguments(
    concat: ConcatConditioning, first_stage: FirstStage, params: Any, batch: dict, keys: Array, size: tuple[int, int]
) -> dict[str, Array]:
    """The denoiser's arguments {"concat" [B, *size, channels]}, with noise augmentation also its level, in training.

    They are made of a batch's images, randomly degraded by keys [B]; `params` has "first_stage", "shift" and "scale",
    `size` is (height, width) of the latents.
    """
    key_degrade, key_noise = split_keys(keys, 2) if concat.noise else (keys, None)
    channels = concat.encode(first_stage, params, concat.degrade(batch, key_degrade), size)
    if concat.noise is None:
        return {"concat": channels}
    noised, level = concat.noise.augment(channels, key_noise)
    return {"concat": noised, **level}


def random_boxes(key: Array, shape: tuple[int, int]) -> Array:
    """bool [H, W, 1]: the union of BOXES random boxes, whose centres lie anywhere in the image."""
    key_side, key_centre = jax.random.split(key)
    side = jax.random.uniform(key_side, (BOXES, 2), minval=0.2, maxval=0.6)
    centre = jax.random.uniform(key_centre, (BOXES, 2))

    def inside(axis: int) -> Array:  # [BOXES, pixels]
        at = (jnp.arange(shape[axis]) + 0.5) / shape[axis]
        return jnp.abs(at - centre[:, axis, None]) < side[:, axis, None] / 2

    return (inside(0)[:, :, None] & inside(1)[:, None, :]).any(0)[..., None]
