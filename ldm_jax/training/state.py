"""What a training stage carries from step to step: arrays only, so that a checkpoint is all of it."""

from typing import Any

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


def make_optimizer(
    *,
    steps: int,
    learning_rate: float,
    warmup_steps: int,
    decay: str,
    adam_b2: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping, with linear warm-up and a constant or cosine learning rate."""
    if decay == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, max(steps, warmup_steps + 1))
    elif decay == "constant":
        # Not optax's own warm-up to a constant, which without steps to warm up in stays at 0.
        warmup, after = optax.linear_schedule(0.0, learning_rate, warmup_steps), optax.constant_schedule(learning_rate)
        rate = optax.join_schedules([warmup, after], [warmup_steps])
    else:
        raise ValueError(f"decay is {decay!r}; it must be 'constant' or 'cosine'")
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(rate, b1=0.9, b2=adam_b2, eps=1e-8, weight_decay=weight_decay),
    )


def ema_update(ema_params: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Moving average of the parameters *after* update number `step` (0-based).

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that the random start is forgotten early.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - rate) * (p - e), ema_params, params)


def keep_if(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `good`, else `old`, leaf by leaf.

    A step whose loss or gradient is not finite leaves the state, its `step` included, as it was. Every later batch
    then disagrees with `state.step`, so the state stays at the failing step until the host looks.
    """
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def update_if_finite(
    state: TrainState,
    number: jax.Array,
    loss: jax.Array,
    grads: Any,
    *,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, jax.Array]:
    """The state after update `number`, and the norm of the gradient; see `keep_if` for when it stays as it was."""
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = ema_update(state.ema_params, params, state.step, ema_decay)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (number == state.step)
    return keep_if(good, TrainState(state.step + 1, params, ema_params, opt_state), state), grad_norm
