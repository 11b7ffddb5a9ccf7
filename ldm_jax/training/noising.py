"""Noisy latents of a batch, for the training of the diffusion model and of the classifier."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.forward import q_sample
from ldm_jax.diffusion.random import split_keys
from ldm_jax.diffusion.timesteps import UNIFORM, TimestepDistribution, sample_timesteps
from ldm_jax.models.first_stage import to_latents
from ldm_jax.models.pixels import flip_images, to_pixels
from ldm_jax.pipeline.model import LatentDiffusion


def add_noise(
    batch: dict,
    frozen: dict,
    keys: Sequence[Array],
    t: Array | None,
    model: LatentDiffusion,
    *,
    flip: bool,
    timesteps: TimestepDistribution = UNIFORM,
) -> dict[str, Array]:
    """Latents z0 of a batch, and z_t by q_sample (Ho 2020, eq. 4).

    Args:
      batch: either cached `moments` [B, F, h, w, 2c] (F = 2 with those of the flipped image, else 1), or `x`
        [B, H, W, C] uint8, optionally with `segments` [B, H, W, 1] uint8.
      frozen: {"first_stage", "shift", "scale"}.
      keys: three arrays of [B] keys.
      t: [B] int; None = sampled from `timesteps`.
      model: its first stage and its process are used.
      flip: random horizontal flips of `x` and `segments`.
      timesteps: the distribution of t.

    Returns:
      {"z0", "t", "eps", "z_t"}, and `x` and `segments` of the batch after flips.
    """
    first_stage, process = model.first_stage, model.process
    key_latents, key_t, key_noise = keys
    key_side, key_raw = split_keys(key_latents, 2)
    images = {name: batch[name] for name in ("x", "segments") if name in batch and "moments" not in batch}
    if "moments" in batch:
        side = jax.vmap(jax.random.bernoulli)(key_side).astype(jnp.int32) * (batch["moments"].shape[1] - 1)
        moments = jax.vmap(lambda m, s: m[s])(batch["moments"], side)
    else:
        images = {name: flip_images(values, key_side) if flip else values for name, values in images.items()}
        moments = first_stage.encode(frozen["first_stage"], to_pixels(images["x"]))
    z0 = to_latents(first_stage.sample(moments, key_raw), frozen["shift"], frozen["scale"])
    if t is None:
        t = sample_timesteps(key_t, len(process), timesteps)
    eps = jax.vmap(partial(jax.random.normal, shape=z0.shape[1:]))(key_noise)
    return images | {"z0": z0, "t": t, "eps": eps, "z_t": q_sample(z0, t, eps, process)}
