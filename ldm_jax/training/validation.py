"""The validation loss on held-out images; of noised ones by ranges of timesteps: overfitting, and where errors lie."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ldm_jax.data.datasets import Dataset
from ldm_jax.runtime.parallel import AXIS, parallel_map, replicate

BUCKETS = 10


def make_validation(
    stage: Any, dataset: Dataset, *, num: int, batch_size: int, T: int
) -> Callable[[Any, dict, int], dict[str, float]]:
    """`validate(params, frozen, seed)` -> {"validation_loss", "validation_loss_0" ... "_9"}.

    The same for all else that `stage.validate` measures. Bucket k holds the timesteps from k T / 10 on. Images,
    timesteps and noise are the same each time: the first `examples_used` of `dataset`, whose timesteps go evenly
    through [0, T).
    """
    num = examples_used(dataset, num, batch_size)
    t = ((np.arange(num) * 2 + 1) * T // (2 * num)).astype(np.int32)
    compiled = _compiled(stage)

    def validate(params: Any, frozen: dict, seed: int) -> dict[str, float]:
        measured: dict[str, np.ndarray] = {}
        fixed = {"params": params, "frozen": replicate(frozen)}
        # Batch j takes every (num / batch_size)-th timestep, so that even one batch goes through all of [0, T).
        for rows in np.arange(num).reshape(batch_size, -1).T:
            batch = dataset[rows % len(dataset)] | {"id": rows.astype(np.int32), "t": t[rows]}
            for name, values in compiled(fixed, batch, np.uint32(seed)).items():
                measured.setdefault(f"validation_{name}", np.zeros(num))[rows] = values
        within = [rows for k in range(BUCKETS) if (rows := t * BUCKETS // T == k).any()]
        return {name: values.mean() for name, values in measured.items()} | {
            f"{name}_{k}": values[rows].mean() for name, values in measured.items() for k, rows in enumerate(within)
        }

    return validate


def make_contrastive_validation(
    stage: Any, dataset: Dataset, *, num: int, batch_size: int
) -> Callable[[Any, dict, int], dict[str, float]]:
    """`validate(params, frozen, seed)` -> {"validation_loss"}, and the same for all else `stage.validate` measures.

    For a stage whose loss compares the examples of a batch: each batch is of `batch_size` of the first `examples_used`
    of `dataset`, from all over these, and the same each time. The loss depends on `batch_size`.
    """
    num = examples_used(dataset, num, batch_size)
    compiled = _compiled(stage, axis_name=AXIS)

    def validate(params: Any, frozen: dict, seed: int) -> dict[str, float]:
        fixed, batches = {"params": params, "frozen": replicate(frozen)}, []
        for rows in np.arange(num).reshape(batch_size, -1).T:
            batch = dataset[rows % len(dataset)] | {"id": rows.astype(np.int32)}
            batches.append(compiled(fixed, batch, np.uint32(seed)))
        return {f"validation_{name}": float(np.mean([each[name] for each in batches])) for name in batches[0]}

    return validate


@lru_cache(maxsize=16)
def _compiled(stage: Any, **options: Any) -> Callable:
    """`stage.validate` on {"params", "frozen"} by `parallel_map`; equal stages share it."""

    def validate(fixed: dict, batch: dict, seed: Any) -> dict[str, Any]:
        return stage.validate(fixed["params"], fixed["frozen"], batch, seed, **options)

    return parallel_map(validate)


def examples_used(dataset: Dataset, num: int, batch_size: int) -> int:
    """How many examples are measured on: whole batches, and at least one."""
    return min(num, len(dataset)) // batch_size * batch_size or batch_size
