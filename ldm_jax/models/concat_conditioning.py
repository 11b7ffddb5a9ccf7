"""Conditioning by concatenation: further input channels of the denoiser, made of an image (Rombach 2022, section 3.3).

Each kind has the same three parts: `degrade` makes of an image what a user would give, `encode` makes of that the
channels at the size of the latents, `channels` is their number.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.forward import q_sample
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import low_resolution_noise, split_keys
from ldm_jax.models.first_stage import FirstStage, to_latents
from ldm_jax.models.pixels import to_pixels, to_uint8

BOXES = 3  # that hide parts of an image, of a fifth to three fifths of its side each


@dataclass(frozen=True)
class NoiseAugmentation:
    """Noise on the low-resolution image, whose level is the denoiser's class label (Ho 2022, section 4).

    As in diffusers' StableDiffusionUpscalePipeline (0.42.1).
    """

    process: Process
    max_noise_level: int

    def apply(self, small: jax.Array, noise_level: jax.Array, noise: jax.Array) -> tuple[jax.Array, dict]:
        """The noised image [B, h, w, C] and the arguments of the denoiser; noise_level [B] from 0 to the highest."""
        return q_sample(small, noise_level, noise, self.process), {"class_labels": noise_level}

    def augment(self, small: jax.Array, keys: jax.Array) -> tuple[jax.Array, dict]:
        """Training: each of [B, h, w, C] at a noise level of its own, uniform from 0 to the highest; keys [B]."""
        key_level, key_noise = split_keys(keys, 2)
        level = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.max_noise_level + 1))(key_level)
        return self.apply(small, level, low_resolution_noise(key_noise, small.shape[1:]))


@dataclass(frozen=True)
class LowResolution:
    """Super-resolution: the image `factor` times smaller (bicubic, antialiased; Rombach 2022, section 4.4)."""

    factor: int
    channels: int
    noise: NoiseAugmentation | None = None

    def degrade(self, batch: dict, keys: jax.Array) -> dict[str, jax.Array]:
        """Images {"x" uint8 [B, H, W, C]} -> {"small" uint8 [B, H / factor, W / factor, C]}."""
        b, height, width, c = batch["x"].shape
        small = (b, height // self.factor, width // self.factor, c)
        return {"small": to_uint8(jax.image.resize(to_pixels(batch["x"]), small, "cubic"))}

    def encode(self, first_stage: FirstStage, params: Any, inputs: dict, size: tuple[int, int]) -> jax.Array:
        """The small image resized to that of the latents, [B, *size, channels] float32."""
        x = to_pixels(inputs["small"])
        return jax.image.resize(x, (len(x), *size, self.channels), "cubic")


@dataclass(frozen=True)
class Inpainting:
    """Inpainting: the mask, and the latents of the image with the masked part grey (Rombach 2022, section 4.5).

    Channels, their order and the mask's reduction (every so-many-th pixel) are those of Stable Diffusion's inpainting
    models in diffusers. In training, random boxes are masked.
    """

    latent_channels: int

    noise = None

    @property
    def channels(self) -> int:
        """The mask's and the latents'."""
        return 1 + self.latent_channels

    def degrade(self, batch: dict, keys: jax.Array) -> dict[str, jax.Array]:
        """Images {"x" uint8 [B, H, W, C]} -> the same with "mask" uint8 [B, H, W, 1], 1 where it is to be sampled."""
        x = batch["x"]
        return {"x": x, "mask": jax.vmap(lambda key: random_boxes(key, x.shape[1:3]))(keys).astype(jnp.uint8)}

    def encode(self, first_stage: FirstStage, params: Any, inputs: dict, size: tuple[int, int]) -> jax.Array:
        """The small mask and the masked image's latents, [B, *size, channels] float32."""
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

    def degrade(self, batch: dict, keys: jax.Array) -> dict[str, jax.Array]:
        """The batch's own "segments" uint8 [B, H, W, 1]."""
        return {"segments": batch["segments"]}

    def encode(self, first_stage: FirstStage, params: Any, inputs: dict, size: tuple[int, int]) -> jax.Array:
        """The fraction of each class at each latent, [B, *size, num_segments] float32."""
        one_hot = jax.nn.one_hot(inputs["segments"][..., 0], self.num_segments)
        return jax.image.resize(one_hot, (len(one_hot), *size, self.num_segments), "linear")


ConcatConditioning = LowResolution | Inpainting | Segmentation


def concat_arguments(
    concat: ConcatConditioning,
    first_stage: FirstStage,
    params: Any,
    batch: dict,
    keys: jax.Array,
    size: tuple[int, int],
) -> dict[str, jax.Array]:
    """The denoiser's arguments made of a batch's own images, degraded at random, in training and for the likelihood.

    Args:
      concat: the conditioning.
      first_stage, params: of the latents: {"first_stage", "shift", "scale"}.
      batch: what `concat.degrade` takes, [B, ...].
      keys: [B].
      size: (height, width) of the latents.

    Returns:
      {"concat" [B, *size, k]}, and with noise augmentation its level.
    """
    key_degrade, key_noise = split_keys(keys, 2) if concat.noise else (keys, None)
    channels = concat.encode(first_stage, params, concat.degrade(batch, key_degrade), size)
    if concat.noise is None:
        return {"concat": channels}
    noised, level = concat.noise.augment(channels, key_noise)
    return {"concat": noised, **level}


def random_boxes(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """bool [H, W, 1]: the union of BOXES random boxes, whose centres lie anywhere in the image."""
    key_side, key_centre = jax.random.split(key)
    side = jax.random.uniform(key_side, (BOXES, 2), minval=0.2, maxval=0.6)
    centre = jax.random.uniform(key_centre, (BOXES, 2))

    def inside(axis: int) -> jax.Array:  # [BOXES, pixels]
        at = (jnp.arange(shape[axis]) + 0.5) / shape[axis]
        return jnp.abs(at - centre[:, axis, None]) < side[:, axis, None] / 2

    return (inside(0)[:, :, None] & inside(1)[:, None, :]).any(0)[..., None]
