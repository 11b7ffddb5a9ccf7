"""Random keys and noise, indexed by (seed, stream, step, example): independent of batch size, devices and hosts."""

from enum import IntEnum
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Stream(IntEnum):
    """Every random stream. No noise is sampled from a key from which other keys are folded."""

    # Folded into the seed's key. Training: step, then example.
    INIT = 0
    AUTOENCODER = 1
    DIFFUSION = 2
    DIFFUSION_VALIDATION = 3
    CLASSIFIER = 4
    CLASSIFIER_VALIDATION = 5
    LIKELIHOOD = 6
    DEGRADE = 7  # the images of concat conditioning at sampling
    CLIP = 8
    CLIP_VALIDATION = 9
    REFINER = 10  # the noise of a refiner behind the base
    MEAN_FLOW = 11  # the intervals
    CONSISTENCY = 12  # the guidance scales
    SAMPLES = 2**32 - 1  # then the sample's index
    # Folded into a sample's key, as are the rows of its solver table.
    INITIAL_LATENTS = 2**32 - 2
    PROJECT = 2**32 - 3  # then the row
    LOW_RESOLUTION = 2**32 - 4


def example_keys(seed: Array, stream: Stream, step: Array, ids: Array) -> Array:
    """The keys [B] of training examples: fold_in(fold_in(fold_in(key(seed), stream), step), id).

    `ids` [B] are the examples' global indices within the batch.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def sample_keys(seed: Array | int, index: Array) -> Array:
    """The keys of samples `index` [B] with this seed: a key array [B]."""
    samples = jax.random.fold_in(jax.random.key(seed), Stream.SAMPLES)
    return jax.vmap(jax.random.fold_in, (None, 0))(samples, jnp.asarray(index, jnp.uint32))


def refiner_seed(seed: int) -> int:
    """The seed of a refiner's noise, independent of the base's with `seed`; both in [0, 2^32)."""
    return int(jax.random.bits(jax.random.fold_in(jax.random.key(np.uint32(seed)), Stream.REFINER)))


def initial_latents(keys: Array, shape: tuple[int, ...]) -> Array:
    """z_T ~ N(0, I): [B, *shape] float32, sample k from keys[k] alone."""
    return normal(fold(keys, Stream.INITIAL_LATENTS), shape)


def low_resolution_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """Noise for the low-resolution image of an upscaler: [B, *shape] float32, independent of the sample's z_T."""
    return normal(fold(keys, Stream.LOW_RESOLUTION), shape)


def fold(keys: Array, data: Array | int) -> Array:
    """fold_in(keys[k], data) for keys [B]; `data` is a scalar."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.asarray(data, jnp.uint32))


def normal(keys: Array, shape: tuple[int, ...]) -> Array:
    """N(0, I): [B, *shape] float32, row k from keys[k] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def split_keys(keys: Array, n: int) -> list[Array]:
    """Keys [B] -> n arrays of keys [B]."""
    return list(jnp.moveaxis(jax.vmap(partial(jax.random.split, num=n))(keys), 1, 0))
