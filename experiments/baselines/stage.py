"""A training stage with one loss, in the form that `ldm_jax.training.loop.train` runs: for models of likelihood."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldm_jax.diffusion.random import example_keys
from ldm_jax.training.state import TrainState, update_if_finite

STREAM = 11  # of `example_keys`; the main job's stages have lower ones


class Stage(NamedTuple):
    """Pure functions, as in `ldm_jax.training`."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    trace: Callable[..., dict[str, Any]]


def make_stage(
    *,
    init_params: Callable[[jax.Array], Any],
    loss: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> Stage:
    """`loss`: (params, images uint8 [B, H, W, C], labels [B], keys [B]) -> [B], one of each example."""

    def init(rng: jax.Array) -> TrainState:
        params = init_params(rng)
        ema_params = jax.tree.map(jnp.copy, params)  # a copy: donating one buffer twice is an error
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))

    def mean_loss(params: Any, batch: dict, seed: jax.Array) -> jax.Array:
        keys = example_keys(seed, STREAM, batch["step"], batch["id"])
        return loss(params, batch["x"], batch["label"], keys).mean()

    def step(state, frozen, batch, seed, *, axis_name=None):
        value, grads = jax.value_and_grad(mean_loss)(state.params, batch, seed)
        if axis_name is not None:
            value, grads = jax.lax.pmean((value, grads), axis_name)
        state, norm = update_if_finite(state, batch["step"], value, grads, optimizer=optimizer, ema_decay=ema_decay)
        return state, {"loss": value, "grad_norm": norm}

    def trace(state, frozen, batch, seed) -> dict[str, Any]:
        value, grads = jax.value_and_grad(mean_loss)(state.params, batch, seed)
        return {"params": state.params, "loss": value, "gradient": grads}

    return Stage(init, step, trace)
