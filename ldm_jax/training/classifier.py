"""The stage of the classifier of noisy latents, for classifier guidance."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.guidance import class_log_probabilities, log_probability
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.training.noising import add_noise
from ldm_jax.training.state import AdamW, GradientStage, TrainState, init_state


@dataclass(frozen=True)
class ClassifierStage(GradientStage):
    """The cross-entropy -log p(y | z_t), t uniform (Dhariwal & Nichol 2021, section 4), as pure functions.

    A batch holds `id` and `label` [B] int32, and `moments` or `x` (see `noising.add_noise`); `frozen` is
    {"first_stage", "shift", "scale"}.

    Attributes:
      model: the diffusion model whose noisy latents are classified; its denoiser is not used.
      classifier: the network.
      flip, adamw, ema_decay: see `GradientStage`.
    """

    model: LatentDiffusion
    classifier: NoisyClassifier
    flip: bool
    adamw: AdamW
    ema_decay: float

    def init(self, rng: jax.Array) -> TrainState:
        """The state before the first update."""
        one = jnp.ones((1,))
        params = self.classifier.init(rng, jnp.zeros((1, *self.model.latent_shape)), one, one)["params"]
        return init_state({"classifier": params}, self.optimizer)

    def validate(self, params: Params, frozen: Params, batch: dict, seed: jax.Array) -> dict[str, jax.Array]:
        """{"loss", "accuracy"} of each example [B] at the timesteps batch["t"] [B]."""
        return self._measure(params, self._add_noise(batch, frozen, seed, Stream.CLASSIFIER_VALIDATION, 0))

    def _example(self, batch: dict, frozen: Params, seed: jax.Array) -> dict:
        return self._add_noise(batch, frozen, seed, Stream.CLASSIFIER, batch["step"])

    def _add_noise(self, batch: dict, frozen: Params, seed: jax.Array, stream: Stream, step: jax.Array | int) -> dict:
        keys = split_keys(example_keys(seed, stream, step, batch["id"]), 3)
        noisy = add_noise(batch, frozen, keys, batch.get("t"), self.model, flip=self.flip)
        return noisy | {"label": batch["label"]}

    def _tensors(self, params: Params, frozen: Params, example: dict) -> dict[str, Any]:
        z_t, t = example["z_t"], example["t"]
        alpha = jnp.ones(t.shape)  # it only scales the logits, which are part of the loss
        _, tensors = self.classifier.apply({"params": params["classifier"]}, z_t, t, alpha, capture_intermediates=True)
        return {"z0": example["z0"], "z_t": z_t, "classifier": tensors["intermediates"]}

    def _measure(self, params: Params, example: dict) -> dict[str, jax.Array]:
        """{"loss", "accuracy"} of each example, [B]."""
        classify = class_log_probabilities(self.classifier.apply, self.model.process)
        log_p = classify(params["classifier"], example["z_t"], example["t"])
        correct = jnp.argmax(log_p, axis=1) == example["label"]
        return {"loss": -log_probability(log_p, example["label"]), "accuracy": correct.astype(jnp.float32)}

    def _loss(
        self, params: Params, frozen: Params, example: dict, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        means = jax.tree.map(jnp.mean, self._measure(params, example))
        return means.pop("loss"), means
