"""The stage of the classifier of noisy latents, for classifier guidance."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.guidance import class_log_probabilities, log_probability
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.training.noising import add_noise
from ldm_jax.training.state import GradientStage, Metrics, TrainState, init_state


@dataclass(frozen=True)
class ClassifierStage(GradientStage):
    """The cross-entropy -log p(y | z_t), t uniform (Dhariwal & Nichol 2021, section 4), as pure functions.

    A batch holds `id` and `label` [B] int32, and `moments` or `x` (see `noising.add_noise`); `frozen` is
    {"first_stage", "shift", "scale"}.

    Attributes:
      model: the diffusion model whose noisy latents are classified; its denoiser is not used.
      classifier: the network.
    """

    model: LatentDiffusion
    classifier: NoisyClassifier

    def init(self, rng: Array) -> TrainState:
        """The state before the first update."""
        one = jnp.ones((1,))
        params = self.classifier.init(rng, jnp.zeros((1, *self.model.latent_shape)), one, one)["params"]
        return init_state({"classifier": params}, self.optimizer)

    def validate(self, params: Params, frozen: Params, batch: dict, seed: Array) -> Metrics:
        """{"loss", "accuracy"} of each example [B] at the timesteps batch["t"] [B]."""
        return self._measure(params, self._add_noise(batch, frozen, seed, Stream.CLASSIFIER_VALIDATION, 0))

    def _example(self, batch: dict, frozen: Params, seed: Array) -> dict:
        return self._add_noise(batch, frozen, seed, Stream.CLASSIFIER, batch["step"])

    def _add_noise(self, batch: dict, frozen: Params, seed: Array, stream: Stream, step: Array | int) -> dict:
        keys = split_keys(example_keys(seed, stream, step, batch["id"]), 3)
        noisy = add_noise(batch, frozen, keys, batch.get("t"), self.model, flip=self.flip)
        return noisy | {"label": batch["label"]}

    def _tensors(self, params: Params, frozen: Params, example: dict) -> dict[str, Any]:
        z_t, t = example["z_t"], example["t"]
        alpha = jnp.ones(t.shape)  # it only scales the logits, which are part of the loss
        _, tensors = self.classifier.apply({"params": params["classifier"]}, z_t, t, alpha, capture_intermediates=True)
        return {"z0": example["z0"], "z_t": z_t, "classifier": tensors["intermediates"]}

    def _measure(self, params: Params, example: dict) -> Metrics:
        """{"loss", "accuracy"} of each example, [B]."""
        classify = class_log_probabilities(self.classifier.apply, self.model.process)
        log_p = classify(params["classifier"], example["z_t"], example["t"])
        correct = jnp.argmax(log_p, axis=1) == example["label"]
        return {"loss": -log_probability(log_p, example["label"]), "accuracy": correct.astype(jnp.float32)}

    def _loss(self, params: Params, frozen: Params, example: dict, axis_name: str | None) -> tuple[Array, Metrics]:
        means = jax.tree.map(jnp.mean, self._measure(params, example))
        return means.pop("loss"), means
