"""What a training stage carries from step to step: arrays only, so that a checkpoint is all of it."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """The whole state of a stage; everything else is a function of it, the seed and the data."""

    step: jax.Array  # [] int32: updates made so far, and the index of the next batch
    params: Any  # float32 trees
    ema_params: Any  # their exponential moving average
    opt_state: Any


class AdamW(NamedTuple):
    """AdamW (Loshchilov 2019) after clipping by the global norm, with linear warm-up; beta1 is 0.9."""

    steps: int  # of the whole schedule
    learning_rate: float
    warmup_steps: int
    decay: str  # of the learning rate after warm-up: constant or cosine
    adam_b2: float
    weight_decay: float
    clip_norm: float


@lru_cache(maxsize=32)
def make_optimizer(optimizer: AdamW) -> optax.GradientTransformation:
    """The optimizer; equal fields give the same object. Raises ValueError for an unknown decay."""
    rate, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.decay == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(optimizer.steps, warmup + 1))
    elif optimizer.decay == "constant":
        # Not optax's own warm-up to a constant, which without steps to warm up in stays at 0.
        parts = [optax.linear_schedule(0.0, rate, warmup), optax.constant_schedule(rate)]
        schedule = optax.join_schedules(parts, [warmup])
    else:
        raise ValueError(f"decay is {optimizer.decay!r}; it must be 'constant' or 'cosine'")
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(schedule, b1=0.9, b2=optimizer.adam_b2, eps=1e-8, weight_decay=optimizer.weight_decay),
    )


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    ema_params = jax.tree.map(jnp.copy, params)  # a copy: donating one buffer twice is an error
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))


def ema_update(ema_params: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Exponential moving average of the parameters *after* update number `step` (0-based).

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that the random start is forgotten early.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - rate) * (p - e), ema_params, params)


def keep_if(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `good`, else `old`, leaf by leaf.

    A step whose loss or gradient is not finite leaves the state, its `step` included, as it was. Every later batch
    then disagrees with `state.step`, so the state stays at the failing step until the host reads the metrics.
    """
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def update_if_finite(
    state: TrainState,
    index: jax.Array,
    loss: jax.Array,
    grads: Any,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, jax.Array]:
    """The state after the update of step `index`, and the gradient's norm; see `keep_if` for a step that failed."""
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = ema_update(state.ema_params, params, state.step, ema_decay)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (index == state.step)
    return keep_if(good, TrainState(state.step + 1, params, ema_params, opt_state), state), grad_norm
