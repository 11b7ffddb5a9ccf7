"""Arrays that are sharded over devices, in checkpoints: what they are, and a checksum that needs no whole copy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils


def is_sharded(leaf: Any) -> bool:
    """Whether no device has the whole array."""
    return isinstance(leaf, jax.Array) and not leaf.sharding.is_fully_replicated


def checksums(arrays: dict[str, Any]) -> dict[str, int]:
    """The checksums of arrays by name: 32 bits each, the same for any sharding, and on the host.

    A checksum is the sum of those of the shards, so that no host needs more than its own. All hosts must call it.
    """
    # Each is waited for: on CPUs, collectives of several programs at once can wait for each other's threads for ever.
    return {name: int(_checksum(jax.block_until_ready(array))) for name, array in arrays.items()}


@jax.jit
def _checksum(array: Array) -> Array:
    """The sum of a hash of each value and its index: a bijection of the value, so that no single change is missed."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis, length in enumerate(array.shape):
        index = index * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3 (Appleby 2011), a bijection of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def any_host(condition: bool) -> bool:
    """Whether the condition holds on any host; all hosts must call it."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(condition))))
