"""From a batch to noised latents: how the examples of every stage behind the autoencoder begin."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.forward import q_sample
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import split_keys
from ldm_jax.models.first_stage import FirstStage, to_latents
from ldm_jax.models.pixels import flip_images, to_pixels


def make_noising(*, first_stage: FirstStage, process: Process, flip: bool) -> Callable[..., dict[str, jax.Array]]:
    """`add_noise(batch, frozen, keys, t=None)` -> {"z0", "t", "eps", "z_t"}, by Ho 2020, eq. 4.

    A batch holds either `moments` [B, F, h, w, 2c] from the cache (F = 2 with the flipped image's, else 1) or `x`
    [B, H, W, C] uint8, which is returned too, perhaps mirrored, with its `segments` [B, H, W, 1]. `frozen` is
    {"autoencoder", "shift", "scale"}; `keys` are three arrays of [B] keys. t [B] is drawn uniformly from [0, T) unless
    given.
    """
    T = len(process)

    def one_side(batch: dict, frozen: dict, keys: jax.Array) -> tuple[jax.Array, dict]:
        """The moments of each example, as it is or mirrored by the coin of its own key, and its pictures alike."""
        if "moments" in batch:
            side = jax.vmap(jax.random.bernoulli)(keys).astype(jnp.int32) * (batch["moments"].shape[1] - 1)
            return jax.vmap(lambda m, s: m[s])(batch["moments"], side), {}
        pictures = {name: batch[name] for name in ("x", "segments") if name in batch}
        if flip:
            pictures = {name: flip_images(images, keys) for name, images in pictures.items()}
        return first_stage.encode(frozen["autoencoder"], to_pixels(pictures["x"])), pictures

    def add_noise(batch: dict, frozen: dict, keys: Sequence[jax.Array], t: jax.Array | None = None) -> dict:
        key_latents, key_t, key_noise = keys
        key_side, key_raw = split_keys(key_latents, 2)
        moments, pictures = one_side(batch, frozen, key_side)
        z0 = to_latents(first_stage.draw(moments, key_raw), frozen["shift"], frozen["scale"])
        if t is None:
            t = jax.vmap(partial(jax.random.randint, shape=(), minval=0, maxval=T))(key_t)
        eps = jax.vmap(partial(jax.random.normal, shape=z0.shape[1:]))(key_noise)
        return pictures | {"z0": z0, "t": t, "eps": eps, "z_t": q_sample(z0, t, eps, process)}

    return add_noise
