"""Fully sharded data parallelism: pure steps under `jax.jit` over a mesh (Rajbhandari 2020, ZeRO stage 3).

The mesh has the axes "data" and "fsdp". Parameters, EMA and optimizer state are sharded over "fsdp", the examples of a
batch over both: XLA all-gathers parameters where they are used and reduce-scatters the gradients.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.runtime.parallel import index_and_seed, replicate, take, with_shardings

AXES = ("data", "fsdp")


def make_mesh(fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh [devices / fsdp, fsdp]; `fsdp` divides their number, 0 stands for it; None: all devices of all hosts."""
    devices = sorted(devices or jax.devices(), key=lambda device: device.process_index)  # a host's rows are consecutive
    return Mesh(np.array(devices).reshape(-1, fsdp or len(devices)), AXES)


def sharding_of(mesh: Mesh, leaf: Any) -> NamedSharding:
    """The sharding of an array over "fsdp": along its longest axis that divides, else every device has it whole."""
    size = mesh.shape["fsdp"]
    divisible = [axis for axis, length in enumerate(np.shape(leaf)) if length and length % size == 0]
    spec: list[str | None] = [None] * np.ndim(leaf)
    if divisible and size > 1:
        spec[max(divisible, key=lambda axis: np.shape(leaf)[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def shard_params(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays, equal on every host, each with its `sharding_of`."""
    return jax.tree.map(lambda leaf: _put(leaf, sharding_of(mesh, leaf)), tree)


def replicate_over(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays, equal on every host, whole on every device of all hosts."""
    return jax.tree.map(lambda leaf: _put(leaf, _everywhere(mesh)), tree)


def gather(mesh: Mesh, tree: Any) -> Any:
    """The whole arrays of a sharded tree on each local device, as of `replicate`; all hosts must call it."""
    whole = _gather(mesh)(tree)
    return replicate(jax.tree.map(lambda leaf: leaf.addressable_data(0), whole))


@lru_cache(maxsize=16)
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=_everywhere(mesh))  # one program: its collectives have one order


def shard_rows(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's part [B / hosts, ...] of a batch as its shards of the global batch [B, ...]."""
    return {name: jax.make_array_from_process_local_data(_rows(mesh), rows) for name, rows in batch.items()}


def sharded_init(mesh: Mesh, init: Callable[..., Any], key: jax.Array, *arguments: Any, **options: Any) -> Any:
    """The state init(key, *arguments), made in shards; `key` [] is a key array, `options` are those of `jax.jit`."""

    def with_key(data: jax.Array, *arguments: Any) -> Any:
        return init(jax.random.wrap_key_data(data), *arguments)

    arguments = (np.asarray(jax.random.key_data(key)), *shard_params(mesh, arguments))
    shards = _shardings(mesh, jax.eval_shape(with_key, *arguments))
    return jax.jit(with_key, out_shardings=shards, **options)(*arguments)


@lru_cache(maxsize=16)
def sharded_step(mesh: Mesh, stage: Any, **static: Any) -> Callable:
    """`parallel.parallel_step` by FSDP, of a state and frozen parameters of `shard_params`, batches of `shard_rows`."""

    def one_step(state, frozen, resident, batch, index, seed):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for kernels, which XLA cannot divide
            return stage.step(state, frozen, take(resident, batch) | {"step": index}, seed, **static)

    compiled: list[Callable] = []  # the arguments have their shardings, and the new state has those of the old one

    def jitted(state):
        if not compiled:
            shards = _shardings(mesh, state), _everywhere(mesh)
            compiled.append(jax.jit(one_step, out_shardings=shards, donate_argnums=0))
        return compiled[0]

    def step(state, *arguments):
        return jitted(state)(state, *arguments)

    step.lower = lambda state, *arguments: jitted(state).lower(state, *arguments)
    return step


def sharded_shapes(mesh: Mesh, state: Any, frozen: Any, resident: Any, batch: Any) -> tuple[Any, ...]:
    """The arguments of `sharded_step` as shapes, as `parallel.step_shapes`; `batch` is of this host."""

    def rows(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((leaf.shape[0] * jax.process_count(), *leaf.shape[1:]), leaf.dtype)

    batch = jax.tree.map(rows, batch)
    shardings = partial(sharding_of, mesh), lambda leaf: _everywhere(mesh), lambda leaf: _rows(mesh)
    state, frozen = with_shardings((state, frozen), shardings[0])
    return state, frozen, with_shardings(resident, shardings[1]), with_shardings(batch, shardings[2]), *index_and_seed()


def _shardings(mesh: Mesh, tree: Any) -> Any:
    return jax.tree.map(partial(sharding_of, mesh), tree)


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(AXES))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """The array with this sharding; each host transfers what its own devices have."""
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
