"""Data parallelism: pure steps under `jax.pmap` over all devices of all hosts, the default engine (see `engine`).

The state has no device axis: by `in_axes=None` it is one logical array, replicated on the devices and donated from
step to step. Batches are [local devices, examples, ...].
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.errors import InputError

AXIS = "data"


def replicate(tree: Any) -> Any:
    """A copy of `tree` on each local device, which pmap takes without another transfer."""
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch: Any) -> Any:
    """Each leaf [B, ...] as [local devices, B / local devices, ...]; raises ValueError if B does not divide."""
    devices = jax.local_device_count()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if len(leaf) % devices:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"a batch of {len(leaf)} ({name}) does not divide over {devices} devices")
    return jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)


def take(resident: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays of `batch`, and its rows batch["index"] of the data set's arrays on the device."""
    batch = dict(batch)
    index = batch.pop("index", None)
    return {name: rows[index] for name, rows in resident.items()} | batch


@lru_cache(maxsize=16)
def parallel_step(stage: Any, devices: Sequence[jax.Device] | None = None, **static: Any) -> Callable:
    """A stage's step as a compiled, data-parallel function; equal stages share it.

    It maps (state, frozen, resident, batch, index, seed) to (state, metrics) by `stage.step(state, frozen, batch,
    seed, axis_name=..., **static)`. `state` is donated, `batch` is sharded (see `shard`), all else is replicated;
    `index` is the step of the batch, `resident` the data set's arrays on the device. `devices` of a topology compile
    only, by the function's `lower`, which takes the shapes of `step_shapes`.
    """

    def one_device(state, frozen, resident, batch, index, seed):
        batch = take(resident, batch) | {"step": index}
        return stage.step(state, frozen, batch, seed, axis_name=AXIS, **static)

    axes = {"in_axes": (None, None, None, 0, None, None), "out_axes": None}
    return jax.pmap(one_device, axis_name=AXIS, **axes, donate_argnums=0, devices=devices)


def step_shapes(
    state: Any, frozen: Any, resident: Any, batch: Any, devices: Sequence[jax.Device] | None = None
) -> tuple[Any, ...]:
    """The arguments of `parallel_step`, with their shardings over `devices` (None: the local ones), as shapes.

    The arguments are arrays or shapes; `batch` [B, ...] is of these devices.
    """
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    whole = NamedSharding(mesh, PartitionSpec())

    def sharded(leaf: Any) -> jax.ShapeDtypeStruct:  # as of `shard`, whose arrays have no sharding yet
        return jax.ShapeDtypeStruct((mesh.size, leaf.shape[0] // mesh.size, *leaf.shape[1:]), leaf.dtype)

    copies = with_shardings((state, frozen, resident), lambda leaf: whole)
    return *copies, jax.tree.map(sharded, batch), *index_and_seed()


def with_shardings(tree: Any, sharding_of: Callable[[Any], NamedSharding]) -> Any:
    """The shapes of a tree of arrays or shapes, each with its sharding."""
    shapes = jax.eval_shape(lambda tree: tree, tree)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf)), shapes)


def index_and_seed() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The shapes of the last two arguments of a step."""
    return jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.uint32)


def parallel_map(function: Callable) -> Callable:
    """`function(params, batch, *rest)` -> [B, ...] on this host's devices: `batch` is sharded, all else replicated."""

    @cache
    def compiled(num_rest: int) -> Callable:
        axes = (None, 0, *(None,) * num_rest)
        return jax.pmap(function, axis_name=AXIS, in_axes=axes, devices=jax.local_devices())

    def call(params: Any, batch: Any, *rest: Any) -> Any:
        sharded = compiled(len(rest))(params, shard(batch), *rest)
        return jax.tree.map(lambda values: np.asarray(values).reshape(-1, *values.shape[2:]), sharded)

    return call


def map_in_batches(mapped: Callable, params: Any, batch: Any, batch_size: int) -> Any:
    """`mapped(params, batch)`, from `parallel_map`, in batches of `batch_size` rows; the last one is padded.

    `batch_size` is rounded down to a multiple of the local devices.
    """
    n, parts, devices = len(jax.tree.leaves(batch)[0]), [], jax.local_device_count()
    batch_size = max(batch_size // devices, 1) * devices
    for start in range(0, n, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), n - 1)
        parts.append(mapped(params, jax.tree.map(lambda values, rows=rows: values[rows], batch)))
    return jax.tree.map(lambda *some: np.concatenate(some)[:n], *parts)


def wait_for_hosts(name: str) -> None:
    """A barrier: returns when all hosts have reached the point `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_same_on_hosts(fields: Mapping[str, Any]) -> None:
    """A barrier that raises InputError on all hosts if a field's value is not the same on all of them."""
    if jax.process_count() == 1:
        return
    names = sorted(fields)
    if not _same(_hash(names)).all():
        raise InputError("this host and another have not the same config fields; ldm_jax must be the same on all hosts")
    same = _same(np.stack([_hash(fields[name]) for name in names]))  # [hosts, fields]
    for index, name in enumerate(names):
        if not same[:, index].all():
            other = int(np.argmin(same[:, index]))
            rule = f"host {other} has another value; start all hosts by the same command"
            raise InputError(f"{name} is {fields[name]!r} on host {jax.process_index()}; {rule}")


def _hash(value: Any) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)


def _same(hashes: np.ndarray) -> np.ndarray:
    """Whether the hashes [..., 32] of this host equal those of each host, [hosts, ...]; a collective."""
    return (multihost_utils.process_allgather(hashes) == hashes).all(axis=-1)
