"""The classifier of noisy latents, which guides a diffusion model on the same latents: a pure stage like that one's."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.guidance import class_log_probabilities, log_probability
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.training.noising import add_noise
from ldm_jax.training.state import AdamW, TrainState, init_state, make_optimizer, update_if_finite


@dataclass(frozen=True)
class ClassifierStage:
    """The cross-entropy -log p(y | z_t), t uniform (Dhariwal & Nichol 2021, section 4), as pure functions.

    A batch holds `id` [B] int32, `label` [B] int32 and `moments` or `x`, as that of the diffusion model does. `frozen`
    is {"first_stage", "shift", "scale"}.

    Attributes:
      model: whose noisy latents are classified; its denoiser takes no part.
      classifier: the network.
      flip: images are mirrored at random.
      adamw, ema_decay: of `state.make_optimizer` and `state.update_if_finite`.
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
        return init_state({"classifier": params}, make_optimizer(self.adamw))

    def step(
        self, state: TrainState, frozen: Params, batch: dict, seed: jax.Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update by the batch; the metrics are scalars."""
        example = self._noised(batch, frozen, seed, Stream.CLASSIFIER, batch["step"])
        (_, metrics), grads = jax.value_and_grad(self._loss, has_aux=True)(state.params, example)
        if axis_name is not None:
            metrics, grads = jax.lax.pmean((metrics, grads), axis_name)
        optimizer = make_optimizer(self.adamw)
        state, grad_norm = update_if_finite(state, batch["step"], metrics["loss"], grads, optimizer, self.ema_decay)
        return state, metrics | {"grad_norm": grad_norm}

    def validate(self, params: Params, frozen: Params, batch: dict, seed: jax.Array) -> dict[str, jax.Array]:
        """{"loss", "accuracy"} of each example [B] at the batch's own timesteps `t` [B]."""
        return self._measure(params, self._noised(batch, frozen, seed, Stream.CLASSIFIER_VALIDATION, 0))

    def trace(self, state: TrainState, frozen: Params, batch: dict, seed: jax.Array) -> dict[str, Any]:
        """Every tensor of the step in the order it arises, by name: for the report on the first that is not finite."""
        example = self._noised(batch, frozen, seed, Stream.CLASSIFIER, batch["step"])
        alpha = jnp.ones(example["t"].shape)  # it only scales the logits, which `loss` shows
        _, tensors = self.classifier.apply(
            {"params": state.params["classifier"]}, example["z_t"], example["t"], alpha, capture_intermediates=True
        )
        (loss, _), grads = jax.value_and_grad(self._loss, has_aux=True)(state.params, example)
        return {"params": state.params, "z0": example["z0"], "z_t": example["z_t"],
                "classifier": tensors["intermediates"], "loss": loss, "gradient": grads}  # fmt: skip

    def _noised(self, batch: dict, frozen: Params, seed: jax.Array, stream: Stream, step: jax.Array | int) -> dict:
        keys = split_keys(example_keys(seed, stream, step, batch["id"]), 3)
        model = self.model
        example = add_noise(batch, frozen, keys, batch.get("t"), model.first_stage, model.process, flip=self.flip)
        return example | {"label": batch["label"]}

    def _measure(self, params: Params, example: dict) -> dict[str, jax.Array]:
        """Loss and accuracy of each example, [B]."""
        classify = class_log_probabilities(self.classifier.apply, self.model.process)
        log_p = classify(params["classifier"], example["z_t"], example["t"])
        correct = jnp.argmax(log_p, axis=1) == example["label"]
        return {"loss": -log_probability(log_p, example["label"]), "accuracy": correct.astype(jnp.float32)}

    def _loss(self, params: Params, example: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        means = jax.tree.map(jnp.mean, self._measure(params, example))
        return means["loss"], means
