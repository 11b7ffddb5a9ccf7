"""Consistency distillation of a diffusion model: samples in a few steps of `lcm`."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.consistency import distilled_steps, pseudo_huber
from ldm_jax.diffusion.denoiser import Estimate, from_network
from ldm_jax.diffusion.forward import NoiseLevel, noise_level, q_sample
from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.onestep import boundary_scalings
from ldm_jax.diffusion.prediction import to_z0
from ldm_jax.diffusion.random import Stream, example_keys
from ldm_jax.pipeline.model import Params, apply_denoiser
from ldm_jax.training.diffusion import DiffusionStage
from ldm_jax.training.state import Metrics, TrainState


@dataclass(frozen=True, kw_only=True)
class ConsistencyStage(DiffusionStage):
    """The loss of latent consistency distillation (Luo 2023, algorithm 1), as pure functions; see `DiffusionStage`.

    The student starts as the teacher, and the target is the EMA of the student (the student itself if `ema_decay` is
    0). `frozen` has the teacher's values of the trained parameters too, as "teacher".

    Attributes:
      guidance_min, guidance_max: the guidance scale of the teacher is uniform between them.
      huber_c: see `consistency.pseudo_huber`.
    """

    guidance_min: float
    guidance_max: float
    huber_c: float

    def step(
        self, state: TrainState, frozen: Params, batch: dict, seed: Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """As of `GradientStage`; the target has the EMA parameters."""
        return super().step(state, frozen | {"target": state.ema_params}, batch, seed, axis_name=axis_name)

    def trace(self, state: TrainState, frozen: Params, batch: dict, seed: Array) -> dict[str, Any]:
        """As of `GradientStage`; the target has the EMA parameters."""
        return super().trace(state, frozen | {"target": state.ema_params}, batch, seed)

    def validate(self, params: Params, frozen: Params, batch: dict, seed: Array) -> Metrics:
        """{"loss": of each example [B]} for the steps over the timesteps batch["t"] [B], at the mean guidance scale."""
        keys = example_keys(seed, Stream.DIFFUSION_VALIDATION, 0, batch["id"])
        example = self._add_noise(batch, frozen, keys, batch["t"])
        scale = jnp.full(len(keys), (self.guidance_min + self.guidance_max) / 2)
        example |= {"dropped": example["label"], "scale": scale}
        return {"loss": self._losses(params, frozen | {"target": params}, example)}

    def _example(self, batch: dict, frozen: Params, seed: Array) -> dict[str, Any]:
        keys = example_keys(seed, Stream.CONSISTENCY, batch["step"], batch["id"])
        sample_scale = partial(jax.random.uniform, minval=self.guidance_min, maxval=self.guidance_max)
        return super()._example(batch, frozen, seed) | {"scale": jax.vmap(sample_scale)(keys)}

    def _add_noise(self, batch: dict, frozen: Params, keys: Array, t: Array | None = None) -> dict[str, Any]:
        """The inputs of the loss, at the start "t" and the end "end" of the teacher's steps over the timesteps."""
        example, process = super()._add_noise(batch, frozen, keys, t), self.model.process
        start, end = distilled_steps(example["t"], len(process))
        return example | {"t": start, "end": end, "z_t": q_sample(example["z0"], start, example["eps"], process)}

    def _teach(self, frozen: Params, example: dict) -> Array:
        """z at the end of a DDIM step of the guided teacher, [B, ...] (Luo 2023, eq. 14)."""
        model, dropped = self.model, example["dropped"]
        null = jnp.full_like(dropped, len(jax.tree.leaves(frozen["table"])[0]) - 1)
        (params, cond), (_, null_cond) = (
            self._condition(frozen["teacher"], frozen, example, each) for each in (dropped, null)
        )
        network = from_network(partial(apply_denoiser, model, params), model.prediction, model.process)
        start, end = (noise_level(example[name], model.process) for name in ("t", "end"))
        z0 = classifier_free(network, cond, null_cond, example["scale"])(example["z_t"], start)
        z0 = z0.z0 if isinstance(z0, Estimate) else z0
        (alpha, sigma), (end_alpha, end_sigma) = (level.broadcast_to(z0) for level in (start, end))
        return end_alpha * z0 + end_sigma * (example["z_t"] - alpha * z0) / sigma

    def _consistency(self, params: Params, frozen: Params, example: dict) -> Array:
        """The consistency function f(z_t, t) [B, ...] of the example's "z_t" and "t"."""
        output, _ = self._predict(params, frozen, example, example["dropped"])
        z_t, level = example["z_t"], noise_level(example["t"], self.model.process)
        z0 = to_z0(self.model.prediction, output, z_t, *level.broadcast_to(z_t))
        c_skip, c_out = NoiseLevel(level.t, *boundary_scalings(level.t)).broadcast_to(z_t)
        return c_skip * z_t + c_out * z0

    def _losses(self, params: Params, frozen: Params, example: dict) -> Array:
        """The loss of each example, [B]."""
        end = example | {"z_t": self._teach(frozen, example), "t": example["end"]}
        target = jax.lax.stop_gradient(self._consistency(frozen["target"], frozen, end))
        return pseudo_huber(self._consistency(params, frozen, example) - target, self.huber_c)

    def _loss(self, params: Params, frozen: Params, example: dict, axis_name: str | None) -> tuple[Array, Metrics]:
        return self._losses(params, frozen, example).mean(), {}
