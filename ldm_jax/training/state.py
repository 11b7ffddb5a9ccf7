"""The state of a training stage, EMA, and the update that rejects gradients that are not finite."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from optax import GradientTransformation

from ldm_jax.diffusion.posthoc_ema import gamma_of
from ldm_jax.models.backend import target_platform
from ldm_jax.training.accumulation import mean_over_micro_batches
from ldm_jax.training.optimizer import Optimization, make_optimizer

Metrics = dict[str, Array]  # by name


@struct.dataclass
class TrainState:
    """The whole state of a stage, as checkpoints hold it: arrays only."""

    step: Array  # [] int32: updates made so far, and the index of the next batch
    params: Any  # float32 trees
    ema_params: Any  # their exponential moving average
    opt_state: Any
    power_emas: Any = ()  # their power function averages, by sigma_rel as text: see `posthoc_ema`


def init_state(params: Any, optimizer: GradientTransformation, ema_sigma_rels: Sequence[float] = ()) -> TrainState:
    """The state before the first update, with a power function average for each of `ema_sigma_rels`."""
    ema_params = jax.tree.map(jnp.copy, params)  # a copy: donating one buffer twice is an error
    power_emas = {str(sigma_rel): jax.tree.map(jnp.copy, params) for sigma_rel in ema_sigma_rels} or ()
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params), power_emas)


def ema_update(ema_params: Any, params: Any, step: Array, decay: float) -> Any:
    """The EMA that includes `params`, which are those *after* update `step` (0-based).

    The decay at step n is min(decay, (1 + n) / (10 + n)), so that the random initialization is forgotten early.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - rate) * (p - e), ema_params, params)


def power_ema_rate(sigma_rel: float, step: Array) -> Array:
    """1 - beta, the weight of the parameters after update `step` (0-based, []) in a power function average: float32.

    With t = step + 1, beta = (1 - 1 / t)^(gamma + 1) (Karras 2024, eq. 127): 1 - beta is the integral of the weights
    over the update, exactly. It is not taken from beta, which rounds it away: after many steps it is (gamma + 1) / t.
    """
    exponent = np.float32(gamma_of(sigma_rel) + 1)
    return -jnp.expm1(exponent * jnp.log1p(-1.0 / (step + 1.0)))


def power_emas_update(power_emas: Any, params: Any, step: Array) -> Any:
    """The power function averages that include `params`, which are those *after* update `step` (0-based)."""
    if not power_emas:
        return power_emas
    rates = {sigma_rel: power_ema_rate(float(sigma_rel), step) for sigma_rel in power_emas}
    return {
        sigma_rel: jax.tree.map(lambda e, p, rate=rates[sigma_rel]: e + rate * (p - e), average, params)
        for sigma_rel, average in power_emas.items()
    }


def update_if(good: Array, update: Callable[..., TrainState], state: TrainState, *arguments: Any) -> TrainState:
    """The `TrainState` update(state, *arguments) if the scalar `good` is true, else `state`.

    A step whose loss or gradient is not finite leaves the state and its `step` unchanged. Later batches are of later
    steps, which are rejected too, so that the state stays at the failed step until the host reads the metrics.

    On CPUs a branch, which updates the arrays in place; elsewhere a selection, for which the host need not wait.
    """
    if target_platform() == "cpu":
        return jax.lax.cond(good, update, lambda state, *_: state, state, *arguments)
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), update(state, *arguments), state)


def update_if_finite(
    state: TrainState, index: Array, loss: Array, grads: Any, optimizer: GradientTransformation, ema_decay: float
) -> tuple[TrainState, Array]:
    """The `TrainState` after step `index`, and the gradient norm; a failed step is rejected (see `update_if`)."""
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (index == state.step)

    def update(state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = ema_update(state.ema_params, params, state.step, ema_decay)
        power_emas = power_emas_update(state.power_emas, params, state.step)
        return TrainState(state.step + 1, params, ema_params, opt_state, power_emas)

    return update_if(good, update, state, grads), grad_norm


@lru_cache(maxsize=8)  # a job needs them three times, and tracing a network takes seconds
def state_shapes(stage: Any) -> Any:
    """The shapes of the state before a stage's first step, whose `init` needs a key alone.

    Equal stages share the tree, which must not be changed.
    """
    return jax.eval_shape(stage.init, jax.random.key(0))


@dataclass(frozen=True, kw_only=True)
class GradientStage:
    """The base of training stages of one loss, as pure functions.

    A stage has the methods `_example(batch, frozen, seed)`, the inputs of the loss, `_loss(params, frozen, example,
    axis_name)` -> (loss, metrics), and `_tensors(params, frozen, example)`, the intermediates by name.
    """

    flip: bool  # random horizontal flips
    optimization: Optimization
    ema_decay: float
    accumulate: int = 1  # micro-batches of a device's batch; more need a loss that is a mean over examples

    @property
    def optimizer(self) -> GradientTransformation:
        """The optimizer of all trained parameters."""
        return make_optimizer(self.optimization)

    def step(
        self, state: TrainState, frozen: dict, batch: dict, seed: Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """The state after one update, and scalar metrics, averaged over the devices."""
        grad = jax.value_and_grad(self._loss, has_aux=True)

        def gradient(batch: dict) -> tuple[tuple[Array, Metrics], Any]:
            return grad(state.params, frozen, self._example(batch, frozen, seed), axis_name)

        (loss, metrics), grads = mean_over_micro_batches(gradient, batch, self.accumulate)
        if axis_name is not None:
            loss, metrics, grads = jax.lax.pmean((loss, metrics, grads), axis_name)
        state, grad_norm = update_if_finite(state, batch["step"], loss, grads, self.optimizer, self.ema_decay)
        return state, metrics | {"loss": loss, "grad_norm": grad_norm}

    def trace(self, state: TrainState, frozen: dict, batch: dict, seed: Array) -> dict[str, Any]:
        """The tensors of the step by name, in the order of their computation; see `loop.first_nonfinite`."""
        example = self._example(batch, frozen, seed)
        (loss, _), grads = jax.value_and_grad(self._loss, has_aux=True)(state.params, frozen, example, None)
        tensors = self._tensors(state.params, frozen, example)
        return {"params": state.params} | tensors | {"loss": loss, "gradient": grads}
