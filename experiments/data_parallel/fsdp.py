"""Fully sharded data parallelism: each device stores one shard of the state (Rajbhandari 2020, ZeRO stage 3).

The step is the one that `ldm_jax.runtime.parallel` maps, jitted over a mesh with a sharded state: XLA all-gathers
parameters where they are used and reduce-scatters the gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.runtime.parallel import AXIS, take


def sharding_of(mesh: Mesh, leaf: Any) -> NamedSharding:
    """The sharding of an array: along its longest axis divisible by the mesh size, else replicated."""
    divisible = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0 and size]
    spec: list[str | None] = [None] * len(leaf.shape)
    if divisible:
        spec[max(divisible, key=lambda axis: leaf.shape[axis])] = AXIS
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_state(mesh: Mesh, state: Any) -> Any:
    """A state, equal on every host, sharded over all devices of all hosts."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), sharding_of(mesh, leaf)), state)


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's batch [B / hosts, ...] as shards of the global batch [B, ...]."""
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    return {name: jax.make_array_from_process_local_data(rows, values) for name, values in batch.items()}


def sharded_step(stage: Any, mesh: Mesh, state: Any) -> Callable:
    """`parallel.parallel_step` by FSDP: for states of `shard_state` and batches of `shard_batch`."""

    def one_step(state, frozen, resident, batch, index, seed):
        return stage.step(state, frozen, take(resident, batch) | {"step": index}, seed)

    shards, everywhere = jax.tree.map(lambda leaf: sharding_of(mesh, leaf), state), replicated(mesh)
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.jit(
        one_step,
        in_shardings=(shards, everywhere, everywhere, rows, everywhere, everywhere),
        out_shardings=(shards, everywhere),
        donate_argnums=0,
    )


def bytes_per_device(state: Any) -> int:
    """The bytes of a state's arrays on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
