"""Data parallelism: pure steps under `jax.pmap` over every device of every host.

The state has no leading device axis: pmap's `in_axes=None` keeps one logical copy, replicated on the devices and
donated from step to step. Batches are [local devices, examples, ...].
"""

from collections.abc import Callable
from functools import lru_cache
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


def shard(batch: Any) -> Any:
    """[B, ...] -> [local devices, B / local devices, ...], leaf by leaf; raises ValueError if B does not divide."""
    devices = jax.local_device_count()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if len(leaf) % devices:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"a batch of {len(leaf)} ({name}) does not divide over {devices} devices")
    return jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)


def unshard(values: jax.Array) -> np.ndarray:
    """[local devices, B / local devices, ...] -> this host's [B, ...]."""
    values = np.asarray(values)
    return values.reshape(-1, *values.shape[2:])


def take(resident: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch's rows of the arrays that live on the device, beside what the batch brings along."""
    batch = dict(batch)
    index = batch.pop("index", None)
    return {name: rows[index] for name, rows in resident.items()} | batch


@lru_cache(maxsize=16)
def parallel_step(stage: Any, **static: Any) -> Callable:
    """`stage.step(state, frozen, batch, seed, axis_name=..., **static)` as one compiled, data-parallel call.

    The call is (state, frozen, resident, batch, index, seed) -> (state, metrics); `state` is donated, `batch` is
    sharded (see `shard`), all else replicated (see `replicate`). `index` is the step that the batch belongs to. Equal
    stages share it, so that training twice in one process compiles once.
    """

    def one_device(state, frozen, resident, batch, index, seed):
        batch = take(resident, batch) | {"step": index}
        return stage.step(state, frozen, batch, seed, axis_name=AXIS, **static)

    return jax.pmap(
        one_device, axis_name=AXIS, in_axes=(None, None, None, 0, None, None), out_axes=None, donate_argnums=0
    )


def parallel_map(function: Callable) -> Callable:
    """`function(params, batch, *rest) -> [B, ...]` over this host's devices: `batch` sharded, all else replicated."""

    def call(params: Any, batch: Any, *rest: Any) -> Any:
        if len(rest) not in compiled:
            axes = (None, 0, *(None,) * len(rest))
            compiled[len(rest)] = jax.pmap(function, axis_name=AXIS, in_axes=axes, devices=jax.local_devices())
        return jax.tree.map(unshard, compiled[len(rest)](params, shard(batch), *rest))

    compiled: dict[int, Callable] = {}
    return call


def map_in_batches(mapped: Callable, params: Any, batch: Any, batch_size: int) -> Any:
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
