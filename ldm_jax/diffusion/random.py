"""Random keys and noise, indexed by (seed, stream, step, example), never consumed."""

from functools import partial

import jax
import jax.numpy as jnp

# Names of the random streams, far above any row or step number. A key that has children is never drawn from.
_SAMPLES, _INITIAL, _PROJECT, _MAP = 2**32 - 1, 2**32 - 2, 2**32 - 3, 2**32 - 4


def sample_keys(seed: jax.Array | int, index: jax.Array) -> jax.Array:
    """The keys of samples `index` [B] of the run with this seed: a key array [B]. Apart from training's streams."""
    samples = jax.random.fold_in(jax.random.key(seed), _SAMPLES)
    return jax.vmap(jax.random.fold_in, (None, 0))(samples, jnp.asarray(index, jnp.uint32))


def initial_latents(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """z_T ~ N(0, I): [B, *shape] float32, sample k from keys[k] alone."""
    return _normal(_fold(keys, _INITIAL), shape)


def map_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise for what a sample is told of as a map: [B, *shape] float32, from keys[k] alone, apart from its z_T."""
    return _normal(_fold(keys, _MAP), shape)


def _fold(keys: jax.Array, name: jax.Array | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.asarray(name, jnp.uint32))


def _normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def example_keys(seed: jax.Array, stream: int, step: jax.Array, ids: jax.Array) -> jax.Array:
    """One key an example, [B]: fold_in(fold_in(fold_in(key(seed), stream), step), id).

    `stream` tells the stages apart; `ids` are the examples' global numbers within the batch. The noise of an example
    so depends neither on the number of devices nor on the batch it travels in.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def split_keys(keys: jax.Array, n: int) -> list[jax.Array]:
    """[B] keys -> n arrays of [B] keys."""
    return list(jnp.moveaxis(jax.vmap(partial(jax.random.split, num=n))(keys), 1, 0))
