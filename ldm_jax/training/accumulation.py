"""Gradient accumulation: the mean of gradients over the micro-batches of a batch, which needs the memory of one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def mean_over_micro_batches(
    function: Callable[[dict[str, Any]], Any], batch: dict[str, Any], accumulate: int, block: int = 1
) -> Any:
    """The mean of `function(micro_batch)` over micro-batches of equal size, one after the other (`lax.scan`).

    For losses, gradients and metrics that are means over examples it is that of the whole batch, up to rounding.

    Args:
      function: maps a batch to a tree of float arrays.
      batch: arrays [B, ...] and the scalar "step", which all micro-batches share.
      accumulate: k, the number of micro-batches. 1 calls `function` on the batch.
      block: rows that stay together; k * block divides B. Micro-batch j has the blocks j, j + k, j + 2k, ..., so that
        of a batch sharded over devices each device keeps its own rows.
    """
    if accumulate == 1:
        return function(batch)
    shared = {"step": batch["step"]}

    def split(rows: jax.Array) -> jax.Array:
        """[B, ...] -> [k, B / k, ...]."""
        blocks = rows.reshape(-1, accumulate, block, *rows.shape[1:])
        return blocks.swapaxes(0, 1).reshape(accumulate, -1, *rows.shape[1:])

    def add(total: Any, rows: dict[str, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(rows | shared)), None

    micro_batches = {name: split(rows) for name, rows in batch.items() if name != "step"}
    shapes = jax.eval_shape(lambda rows: function({name: row[0] for name, row in rows.items()} | shared), micro_batches)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return jax.tree.map(lambda leaf: leaf / accumulate, total)
