"""Training stage of likelihood-based models, for `ldm_jax.training.loop.train`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.diffusion.random import example_keys
from ldm_jax.training.optimizer import Optimization, make_optimizer
from ldm_jax.training.state import TrainState, init_state, update_if_finite

STREAM = 11  # random stream of `example_keys`; those of ldm_jax are lower


@dataclass(frozen=True)
class LikelihoodStage:
    """The training stage of a model whose loss is its bits per dimension.

    A batch holds `x` [B, H, W, C] uint8, and `label` and `id` [B] int32. There are no frozen parameters.

    Attributes:
      model: called with x [B, H, W, C] in [-1, 1] and labels [B].
      bits_per_dim: (model, params, images uint8 [B, H, W, C], labels [B], keys [B]) -> [B].
      image_shape: (H, W, C).
      optimization, ema_decay: see `optimizer.make_optimizer` and `state.update_if_finite`.
    """

    model: nn.Module
    bits_per_dim: Callable[..., jax.Array]
    image_shape: tuple[int, int, int]
    optimization: Optimization
    ema_decay: float

    def init(self, rng: jax.Array) -> TrainState:
        """The state before the first update."""
        params = self.model.init(rng, jnp.zeros((1, *self.image_shape)), jnp.zeros((1,), jnp.int32))["params"]
        return init_state(params, make_optimizer(self.optimization))

    def step(
        self, state: TrainState, frozen: dict, batch: dict, seed: jax.Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after one update, and scalar metrics."""
        loss, grads = jax.value_and_grad(self._loss)(state.params, batch, seed)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        optimizer = make_optimizer(self.optimization)
        state, grad_norm = update_if_finite(state, batch["step"], loss, grads, optimizer, self.ema_decay)
        return state, {"loss": loss, "grad_norm": grad_norm}

    def trace(self, state: TrainState, frozen: dict, batch: dict, seed: jax.Array) -> dict[str, Any]:
        """The tensors of the step by name, to report the first that is not finite."""
        loss, grads = jax.value_and_grad(self._loss)(state.params, batch, seed)
        return {"params": state.params, "loss": loss, "gradient": grads}

    def _loss(self, params: Any, batch: dict, seed: jax.Array) -> jax.Array:
        keys = example_keys(seed, STREAM, batch["step"], batch["id"])
        return self.bits_per_dim(self.model, params, batch["x"], batch["label"], keys).mean()
