"""From a batch to noised latents: how the examples of every stage behind the autoencoder begin."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.pixels import flip_images, to_pixels
from ldm_jax.diffusion.process import q_sample
from ldm_jax.first_stage import FirstStage, to_latents


def make_noising(*, first_stage: FirstStage, alpha_bar: np.ndarray, flip: bool) -> Callable[..., dict[str, jax.Array]]:
    """`add_noise(batch, frozen, keys, t=None)` -> {"z0", "t", "eps", "z_t"}, by Ho 2020, eq. 4.

    A batch holds either `moments` [B, F, h, w, 2c] from the cache (F = 2 with the flipped image's, else 1) or `x`
    [B, H, W, C] uint8; `frozen` is {"autoencoder", "shift", "scale"}; `keys` are three arrays of [B] keys. t [B] is
    drawn uniformly from [0, T) unless given.
    """
    T = alpha_bar.shape[0]

    def latents(batch: dict, frozen: dict, keys: jax.Array) -> jax.Array:
        key_flip, key_raw = split_keys(keys, 2)
        if "moments" in batch:
            side = jax.vmap(jax.random.bernoulli)(key_flip).astype(jnp.int32) * (batch["moments"].shape[1] - 1)
            moments = jax.vmap(lambda m, s: m[s])(batch["moments"], side)
        else:
            x = to_pixels(batch["x"])
            moments = first_stage.encode(frozen["autoencoder"], flip_images(x, key_flip) if flip else x)
        return to_latents(first_stage.draw(moments, key_raw), frozen["shift"], frozen["scale"])

    def add_noise(batch: dict, frozen: dict, keys: Sequence[jax.Array], t: jax.Array | None = None) -> dict:
        key_latents, key_t, key_noise = keys
        z0 = latents(batch, frozen, key_latents)
        if t is None:
            t = jax.vmap(partial(jax.random.randint, shape=(), minval=0, maxval=T))(key_t)
        eps = jax.vmap(partial(jax.random.normal, shape=z0.shape[1:]))(key_noise)
        return {"z0": z0, "t": t, "eps": eps, "z_t": q_sample(z0, t, eps, alpha_bar)}

    return add_noise


def split_keys(keys: jax.Array, n: int) -> list[jax.Array]:
    """[B] keys -> n arrays of [B] keys."""
    return list(jnp.moveaxis(jax.vmap(partial(jax.random.split, num=n))(keys), 1, 0))
