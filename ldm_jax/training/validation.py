"""The validation of a stage on held-out images; of noisy latents also by ranges of timesteps."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ldm_jax.data.datasets import Dataset
from ldm_jax.runtime.parallel import AXIS, parallel_map, replicate

BUCKETS = 10  # ranges of timesteps


def make_validation(
    stage: Any, dataset: Dataset, *, num: int, batch_size: int, T: int | None = None
) -> Callable[[Any, dict, int], dict[str, float]]:
    """`validate(params, frozen, seed)` -> {"validation_NAME": mean over examples} for each metric of `stage.validate`.

    The first `examples_used` of `dataset` are measured, with the same noise in each call.

    Args:
      stage: has `validate`.
      dataset: the held-out examples.
      num: of examples, at most.
      batch_size: over all devices.
      T: the number of timesteps of a stage on noisy latents. The examples' timesteps are evenly spaced in [0, T), and
        "validation_NAME_k" is the mean over timesteps from k T / 10 on, k = 0 ... 9. None = a stage whose loss
        compares the examples of a batch, over all devices.
    """
    num = examples_used(dataset, num, batch_size)
    # Batch j takes every (num / batch_size)-th example, so that a single batch spans all timesteps.
    batches = np.arange(num).reshape(batch_size, -1).T
    t = None if T is None else ((np.arange(num) * 2 + 1) * T // (2 * num)).astype(np.int32)
    buckets = [] if T is None else [rows for k in range(BUCKETS) if (rows := t * BUCKETS // T == k).any()]
    compiled = _compiled(stage, **({"axis_name": AXIS} if T is None else {}))

    def batch(rows: np.ndarray) -> dict[str, np.ndarray]:
        return dataset[rows % len(dataset)] | {"id": rows.astype(np.int32)} | ({} if T is None else {"t": t[rows]})

    def validate(params: Any, frozen: dict, seed: int) -> dict[str, float]:
        fixed, means = {"params": params, "frozen": replicate(frozen)}, {}
        measured = [compiled(fixed, batch(rows), np.uint32(seed)) for rows in batches]
        for name in measured[0]:
            values = np.stack([metrics[name] for metrics in measured])  # [batches, batch_size]
            if T is not None:
                by_example = np.zeros(num)
                by_example[batches] = values
                values = by_example
            means[f"validation_{name}"] = float(values.mean())
            means |= {f"validation_{name}_{k}": float(values[rows].mean()) for k, rows in enumerate(buckets)}
        return means

    return validate


@lru_cache(maxsize=16)
def _compiled(stage: Any, **options: Any) -> Callable:
    """`stage.validate` on {"params", "frozen"} by `parallel_map`; equal stages share it."""

    def validate(fixed: dict, batch: dict, seed: Any) -> dict[str, Any]:
        return stage.validate(fixed["params"], fixed["frozen"], batch, seed, **options)

    return parallel_map(validate)


def examples_used(dataset: Dataset, num: int, batch_size: int) -> int:
    """The number of examples, of `num` at most, that validation uses: whole batches, at least one."""
    return min(num, len(dataset)) // batch_size * batch_size or batch_size
