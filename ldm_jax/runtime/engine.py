"""Engines: the distribution of a stage's pure step over the devices, by `pmap` or by FSDP."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from ldm_jax.runtime import fsdp as sharded
from ldm_jax.runtime.parallel import parallel_step, replicate, shard, step_shapes


class Engine(NamedTuple):
    """How training steps are distributed over all devices of all hosts."""

    init: Callable[..., Any]  # (init, key, *arguments, **options of jit) -> the state init(key, *arguments), placed
    place_params: Callable[[Any], Any]  # a state, or frozen parameters, for the steps
    place: Callable[[Any], Any]  # arrays that each device has whole
    shard_batch: Callable[[Any], Any]  # this host's part of a batch
    step: Callable[..., Callable]  # (stage, **static) -> its compiled step, see `parallel.parallel_step`
    shapes: Callable[..., tuple]  # (state, frozen, resident, batch) -> shapes for the step's `lower`
    gather: Callable[[Any], Any]  # placed parameters as `pmap` takes them, for sampling and validation: a collective


def _init(init: Callable[..., Any], key: jax.Array, *arguments: Any, **options: Any) -> Any:
    return jax.jit(init, **options)(key, *arguments)


PMAP = Engine(_init, replicate, replicate, shard, parallel_step, step_shapes, lambda params: params)


def make_engine(name: str, fsdp: int = 0, devices: Sequence[jax.Device] | None = None) -> Engine:
    """The engine "pmap", or "fsdp", which shards the state over `fsdp` devices, which divides all; 0 = over all.

    With the `devices` of a topology, which only compile, `shapes` and the `lower` of `step` are for them.

    Raises ValueError for another name.
    """
    if name == "pmap" and devices is None:
        return PMAP
    if name == "pmap":
        lowered = {"step": parallel_step, "shapes": step_shapes}
        return PMAP._replace(**{field: partial(function, devices=devices) for field, function in lowered.items()})
    if name != "fsdp":
        raise ValueError(f"engine is {name!r}; it must be 'pmap' or 'fsdp'")
    mesh = sharded.make_mesh(fsdp, devices)
    functions = (sharded.sharded_init, sharded.shard_params, sharded.replicate_over, sharded.shard_rows)
    functions += sharded.sharded_step, sharded.sharded_shapes, sharded.gather
    return Engine(*(partial(function, mesh) for function in functions))
