"""The training of MeanFlow: the average velocity of a rectified flow, for samples by one network call."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.mean_flow import Velocity, adaptive_loss, guided_velocity, mean_flow_target
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.diffusion.timesteps import sample_times
from ldm_jax.pipeline.model import Params, apply_denoiser
from ldm_jax.training.diffusion import DiffusionStage
from ldm_jax.training.state import Metrics


@dataclass(frozen=True, kw_only=True)
class MeanFlowStage(DiffusionStage):
    """The loss of MeanFlow (Geng 2025, algorithm 1, eq. 22), as pure functions; see `DiffusionStage`.

    Attributes:
      interval_ratio: probability of an interval [r, t] with r < t; the others have r = t, which is flow matching. t is
        the later of two times from `timesteps`, continuous here, in both cases, and r the earlier or t.
      guidance, kappa: of the training target, where the condition is not dropped: see `mean_flow.guided_velocity`.
      tangent: "sample" (eps - z0, Geng 2025) or "network" (its marginal velocity, Geng 2025b).
      adaptive_power: see `mean_flow.adaptive_loss`.
    """

    interval_ratio: float
    guidance: float
    kappa: float
    tangent: str
    adaptive_power: float

    def _example(self, batch: dict, frozen: Params, seed: Array) -> dict[str, Any]:
        example = super()._example(batch, frozen, seed)
        keys = example_keys(seed, Stream.MEAN_FLOW, batch["step"], batch["id"])
        *keys, key_ratio = split_keys(keys, 3)
        one, other = (sample_times(each, self.timesteps) for each in keys)
        apart = jax.vmap(partial(jax.random.bernoulli, p=self.interval_ratio))(key_ratio)
        time = jnp.maximum(one, other)
        interval = jnp.where(apart, jnp.abs(one - other), 0.0)
        at = time.reshape(-1, *[1] * (example["z0"].ndim - 1))
        z_t = (1 - at) * example["z0"] + at * example["eps"]
        return example | {"z_t": z_t, "time": time, "interval": interval, "t": self._timestep(time)}

    def _timestep(self, time: Array) -> Array:
        """The fractional timestep [B] of times in [0, 1], the sigma of rectified flow: see `schedules`."""
        return time * len(self.model.process) - 1

    def _velocity(self, params: Params, frozen: Params, example: dict, label: Array, **changes: Any) -> Velocity:
        """The network as u(z_t, time, interval) with the conditions `label` [B]; `changes` are fields of the module."""
        params, cond = self._condition(params, frozen, example, label)
        model = replace(self.model, denoiser=self.model.denoiser.clone(**changes))

        def velocity(z_t: Array, time: Array, interval: Array) -> Array:
            return apply_denoiser(model, params, z_t, self._timestep(time), cond | {"interval": interval})

        return velocity

    def _loss(self, params: Params, frozen: Params, example: dict, axis_name: str | None) -> tuple[Array, Metrics]:
        dropped, at = example["dropped"], tuple(example[name] for name in ("z_t", "time", "interval"))
        fixed, now = jax.lax.stop_gradient(params), (*at[:2], jnp.zeros_like(at[2]))
        v = example["eps"] - example["z0"]
        if self.guidance != 1 or self.kappa:
            null = jnp.full_like(dropped, len(jax.tree.leaves(frozen["table"])[0]) - 1)
            u_null = self._velocity(fixed, frozen, example, null)(*now)
            u_cond = self._velocity(fixed, frozen, example, dropped)(*now) if self.kappa else u_null  # not used without
            guided = guided_velocity(v, u_null, u_cond, self.guidance, self.kappa)
            v = jnp.where((dropped == null).reshape(-1, *[1] * (v.ndim - 1)), v, guided)
        # In float32: du/dt loses all digits in bfloat16, for which attention may be a kernel without a second gradient.
        network = self._velocity(fixed, frozen, example, dropped, dtype=jnp.float32)
        tangent = network(*now) if self.tangent == "network" else v
        target = mean_flow_target(network, *at, v, tangent)
        error = self._velocity(params, frozen, example, dropped)(*at) - target
        loss, squared = adaptive_loss(error, self.adaptive_power)
        return loss.mean(), {"squared_error": squared.mean() * error.shape[0] / error.size}
