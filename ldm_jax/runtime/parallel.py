"""Data parallelism: pure steps under `jax.pmap` over every device of every host.

The state has no leading device axis: pmap's `in_axes=None` keeps one logical copy, replicated on the devices and
donated from step to step. Batches are [local devices, examples, ...].
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def replicate(tree: Any) -> Any:
    """A copy of `tree` on each local device, as pmap takes it without moving it again."""
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch: dict[str, Any]) -> dict[str, Any]:
    """[B, ...] -> [local devices, B / local devices, ...], leaf by leaf; raises ValueError if B does not divide."""
    devices = jax.local_device_count()
    for name, value in batch.items():
        n = len(jax.tree.leaves(value)[0])
        if n % devices:
            raise ValueError(f"a batch of {n} ({name}) does not divide over {devices} devices")
    return jax.tree.map(lambda value: value.reshape(devices, -1, *value.shape[1:]), batch)


def unshard(values: jax.Array) -> np.ndarray:
    """[local devices, B / local devices, ...] -> this host's [B, ...]."""
    values = np.asarray(values)
    return values.reshape(-1, *values.shape[2:])


def take(resident: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch's rows of the arrays that live on the device, beside what the batch brings along."""
    batch = dict(batch)
    index = batch.pop("index", None)
    return {name: rows[index] for name, rows in resident.items()} | batch


def parallel_step(step: Callable) -> Callable:
    """`step(state, frozen, batch, seed, axis_name)` as one compiled, data-parallel call.

    The call is (state, frozen, resident, batch, number, seed) -> (state, metrics); `state` is donated, `batch` is
    sharded (see `shard`), all else replicated (see `replicate`). `number` is the step that the batch belongs to.
    """

    def one_device(state, frozen, resident, batch, number, seed):
        batch = take(resident, batch) | {"step": number}
        return step(state, frozen, batch, seed, axis_name=AXIS)

    return jax.pmap(
        one_device, axis_name=AXIS, in_axes=(None, None, None, 0, None, None), out_axes=None, donate_argnums=0
    )


def parallel_map(function: Callable) -> Callable:
    """`function(params, batch, *rest) -> [B, ...]` over this host's devices: `batch` sharded, all else replicated."""

    def call(params: Any, batch: dict[str, np.ndarray], *rest: Any) -> Any:
        if len(rest) not in compiled:
            axes = (None, 0, *(None,) * len(rest))
            compiled[len(rest)] = jax.pmap(function, axis_name=AXIS, in_axes=axes, devices=jax.local_devices())
        return jax.tree.map(unshard, compiled[len(rest)](params, shard(batch), *rest))

    compiled: dict[int, Callable] = {}
    return call


def map_in_batches(mapped: Callable, params: Any, batch: dict[str, Any], batch_size: int) -> Any:
    """`mapped`, from `parallel_map`, over any number of rows, `batch_size` at a time; the last batch is filled up."""
    n, parts = len(jax.tree.leaves(batch)[0]), []
    for start in range(0, n, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), n - 1)
        parts.append(mapped(params, jax.tree.map(lambda values, rows=rows: values[rows], batch)))
    return jax.tree.map(lambda *some: np.concatenate(some)[:n], *parts)


def wait_for_hosts(name: str) -> None:
    """Returns when every host has come to the point `name`: what the first has written, the others can read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
