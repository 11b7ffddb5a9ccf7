"""Fully sharded data parallelism: of the state, each device keeps a part alone (Rajbhandari 2020, ZeRO's third stage).

The step is the one that `ldm_jax.runtime.parallel` maps. Compiled over a mesh instead, with the state's arrays cut
into parts, XLA gathers what it needs of them when it needs it, and scatters the gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.runtime.parallel import AXIS, take


def cut(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Where the parts of an array lie: cut along its longest axis that divides, else whole on every device."""
    divides = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0 and size]
    spec: list[str | None] = [None] * len(leaf.shape)
    if divides:
        spec[max(divides, key=lambda axis: leaf.shape[axis])] = AXIS
    return NamedSharding(mesh, PartitionSpec(*spec))


def whole(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_state(mesh: Mesh, state: Any) -> Any:
    """The state, the same on every host, as parts on all devices of all hosts."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), cut(mesh, leaf)), state)


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's part of a batch [B / hosts, ...], as a part of the whole [B, ...]."""
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    return {name: jax.make_array_from_process_local_data(rows, values) for name, values in batch.items()}


def sharded_step(stage: Any, mesh: Mesh, state: Any) -> Callable:
    """As `parallel.parallel_step`, with `state` as `shard_state` and batches as `shard_batch` make them."""

    def one_step(state, frozen, resident, batch, index, seed):
        return stage.step(state, frozen, take(resident, batch) | {"step": index}, seed)

    parts, everywhere = jax.tree.map(lambda leaf: cut(mesh, leaf), state), whole(mesh)
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.jit(
        one_step,
        in_shardings=(parts, everywhere, everywhere, rows, everywhere, everywhere),
        out_shardings=(parts, everywhere),
        donate_argnums=0,
    )


def bytes_on_a_device(state: Any) -> int:
    """Of a state's arrays, what lies on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
