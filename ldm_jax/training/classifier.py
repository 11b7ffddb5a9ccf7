"""The classifier of noisy latents, which guides a diffusion model on the same latents: a pure stage like that one's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from ldm_jax.diffusion.guidance import class_log_probabilities, log_probability
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.training.noising import make_noising
from ldm_jax.training.state import TrainState, update_if_finite


class ClassifierStage(NamedTuple):
    """The pure functions of the stage. `frozen` is {"autoencoder", "shift", "scale"}: arrays that do not learn."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    validate: Callable[..., dict[str, jax.Array]]
    trace: Callable[..., dict[str, Any]]


def make_classifier_stage(
    *,
    classifier: nn.Module,
    first_stage: FirstStage,
    latent_shape: tuple[int, int, int],
    process: Process,
    flip: bool,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> ClassifierStage:
    """Builds the stage for the cross-entropy -log p(y | z_t), t uniform (Dhariwal & Nichol 2021, section 4).

    A batch holds `id` [B] int32, `label` [B] int32 and `moments` or `x`, as that of the diffusion model does.
    """
    add_noise = make_noising(first_stage=first_stage, process=process, flip=flip)
    classify = class_log_probabilities(classifier.apply, process)

    def init(rng: jax.Array) -> TrainState:
        one = jnp.ones((1,))
        params = {"classifier": classifier.init(rng, jnp.zeros((1, *latent_shape)), one, one)["params"]}
        ema_params = jax.tree.map(jnp.copy, params)  # a copy: donating one buffer twice is an error
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))

    def noised(batch: dict, frozen: dict, seed: jax.Array, stream: Stream, step: jax.Array | int) -> dict:
        keys = example_keys(seed, stream, step, batch["id"])
        return add_noise(batch, frozen, split_keys(keys, 3), batch.get("t")) | {"label": batch["label"]}

    def measure(params: dict, example: dict) -> dict[str, jax.Array]:
        """Loss and accuracy of each example, [B]."""
        log_p = classify(params["classifier"], example["z_t"], example["t"])
        right = jnp.argmax(log_p, axis=1) == example["label"]
        return {"loss": -log_probability(log_p, example["label"]), "accuracy": right.astype(jnp.float32)}

    def loss_fn(params: dict, example: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        means = jax.tree.map(jnp.mean, measure(params, example))
        return means["loss"], means

    def step(state, frozen, batch, seed, *, axis_name=None):
        example = noised(batch, frozen, seed, Stream.CLASSIFIER, batch["step"])
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, example)
        if axis_name is not None:
            metrics, grads = jax.lax.pmean((metrics, grads), axis_name)
        state, grad_norm = update_if_finite(
            state, batch["step"], metrics["loss"], grads, optimizer=optimizer, ema_decay=ema_decay
        )
        return state, metrics | {"grad_norm": grad_norm}

    def validate(params, frozen, batch, seed):
        """{"loss", "accuracy"} of each example [B] at the batch's own timesteps `t` [B]."""
        return measure(params, noised(batch, frozen, seed, Stream.CLASSIFIER_VALIDATION, 0))

    def trace(state, frozen, batch, seed) -> dict[str, Any]:
        """Every tensor of the step in the order it arises, by name: for the report on the first that is not finite."""
        example = noised(batch, frozen, seed, Stream.CLASSIFIER, batch["step"])
        alpha = jnp.ones(example["t"].shape)  # it only scales the logits, which `loss` shows
        _, seen = classifier.apply(
            {"params": state.params["classifier"]}, example["z_t"], example["t"], alpha, capture_intermediates=True
        )
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, example)
        return {"params": state.params, "z0": example["z0"], "z_t": example["z_t"],
                "classifier": seen["intermediates"], "loss": loss, "gradient": grads}  # fmt: skip

    return ClassifierStage(init, step, validate, trace)
