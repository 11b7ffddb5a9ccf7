"""The optimizers of the training stages: AdamW, and Muon for the kernels of the hidden layers."""

from functools import lru_cache
from typing import NamedTuple

import optax
from optax import GradientTransformation

from ldm_jax.training.muon import muon

OPTIMIZERS = ("adamw", "muon")


class Optimization(NamedTuple):
    """The optimizer, clipping by the global gradient norm, and the learning rate schedule with linear warm-up."""

    steps: int  # of the whole learning rate schedule
    learning_rate: float
    warmup_steps: int
    decay: str  # of the learning rate after warm-up: constant or cosine
    adam_b2: float
    weight_decay: float
    clip_norm: float
    optimizer: str = "adamw"  # or "muon"


@lru_cache(maxsize=32)
def make_optimizer(optimization: Optimization) -> GradientTransformation:
    """The optimizer; equal arguments give the same object.

    AdamW (Loshchilov & Hutter 2019) has beta1 = 0.9; see `training.muon` for Muon.

    Raises:
      ValueError: for an unknown optimizer or decay.
    """
    if optimization.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {optimization.optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}")
    options = {"b1": 0.9, "b2": optimization.adam_b2, "weight_decay": optimization.weight_decay}
    optimizer = {"adamw": optax.adamw, "muon": muon}[optimization.optimizer]
    update = optimizer(_learning_rate(optimization), **options)
    return optax.chain(optax.clip_by_global_norm(optimization.clip_norm), update)


def _learning_rate(optimization: Optimization) -> optax.Schedule:
    """The learning rate by step."""
    rate, warmup = optimization.learning_rate, optimization.warmup_steps
    if optimization.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(optimization.steps, warmup + 1))
    if optimization.decay == "constant":
        # Not optax.warmup_constant_schedule, which with 0 warm-up steps stays at 0.
        return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), optax.constant_schedule(rate)], [warmup])
    raise ValueError(f"decay is {optimization.decay!r}; it must be 'constant' or 'cosine'")
