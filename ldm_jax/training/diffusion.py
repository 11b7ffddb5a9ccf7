"""Stage 2, the diffusion model: the training step, validation and trace of a latent diffusion model."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import to_var_frac
from ldm_jax.diffusion.losses import diffusion_loss, variance_loss
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.diffusion.timesteps import TimestepDistribution
from ldm_jax.models.concat_conditioning import concat_arguments
from ldm_jax.pipeline.model import LatentDiffusion, Params, apply_denoiser
from ldm_jax.pipeline.trainable import Trainable
from ldm_jax.training.noising import add_noise
from ldm_jax.training.state import GradientStage, Metrics, TrainState, init_state


@dataclass(frozen=True)
class DiffusionStage(GradientStage):
    """The loss of Ho 2020, eq. 14 (Rombach 2022, eq. 3), for any prediction, as pure functions.

    With a learned variance it is L_simple + vlb_weight L_vlb (Nichol 2021, eq. 16).

    A batch holds `id` [B] int32, `label` [B] int32 (without it all have the null condition), and `moments` or `x` (see
    `noising.add_noise`); with concat conditioning `x`, and `segments` if that is a segmentation map.

    `frozen` are the arrays that are not trained: `trainable.frozen` of the model's parameters, and "table"
    [K + 1, ...], the inputs of the conditioning by label, the null condition last. If a label has several captions,
    their rows of the table are "captions" int32 [P, k].

    Attributes:
      model, trainable: the model, and which of its parameters are trained.
      weighting, snr_gamma: see `losses.diffusion_loss`.
      timesteps: the distribution of the timesteps.
      label_dropout: probability of the null condition, for classifier-free guidance.
      vlb_weight: lambda of Nichol 2021, eq. 16; used with a learned variance only.
      ema_sigma_rels: lengths of the power function averages that the state has (see `posthoc_ema`).
    """

    model: LatentDiffusion
    trainable: Trainable
    weighting: str
    snr_gamma: float
    timesteps: TimestepDistribution
    label_dropout: float
    vlb_weight: float
    ema_sigma_rels: tuple[float, ...]

    def init(self, rng: Array, params: Params) -> TrainState:
        """The state before the first update, of a model with these parameters."""
        return init_state(self.trainable.init(rng, params), self.optimizer, self.ema_sigma_rels)

    def validate(self, params: Params, frozen: Params, batch: dict, seed: Array) -> Metrics:
        """{"loss": unweighted, of each example [B]} at the timesteps batch["t"] [B], without label dropout."""
        keys = example_keys(seed, Stream.DIFFUSION_VALIDATION, 0, batch["id"])
        example = self._add_noise(batch, frozen, keys, batch["t"])
        output, _ = self._predict(params, frozen, example, example["label"])
        return {"loss": self._simple_loss(output, example, "uniform")}

    def _example(self, batch: dict, frozen: Params, seed: Array) -> dict[str, Any]:
        return self._add_noise(batch, frozen, example_keys(seed, Stream.DIFFUSION, batch["step"], batch["id"]))

    def _tensors(self, params: Params, frozen: Params, example: dict) -> dict[str, Any]:
        z_t = example["z_t"]
        params, cond = self._condition(params, frozen, example, example["dropped"])
        _, tensors = apply_denoiser(self.model, params, z_t, example["t"], cond, capture_intermediates=True)
        return {"z0": example["z0"], "z_t": z_t, **cond, "denoiser": tensors["intermediates"]}

    def _add_noise(self, batch: dict, frozen: Params, keys: Array, t: Array | None = None) -> dict[str, Any]:
        """The inputs of the loss; `t` [B], if None, is sampled from `timesteps`."""
        *noising_keys, key_label, key_concat = split_keys(keys, 5)
        model, concat = self.model, {}
        example = add_noise(batch, frozen, noising_keys, t, model, flip=self.flip, timesteps=self.timesteps)
        null = len(jax.tree.leaves(frozen["table"])[0]) - 1
        label = batch.get("label", jnp.full(example["t"].shape, null, jnp.int32))
        if "captions" in frozen:
            key_label, key_caption = split_keys(key_label, 2)
            label = choose_caption(frozen["captions"], label, key_caption)
        drop = jax.vmap(partial(jax.random.bernoulli, p=self.label_dropout))(key_label)
        if model.concat:
            size = model.latent_shape[:2]
            concat = concat_arguments(model.concat, model.first_stage, frozen, example, key_concat, size)
        return example | {"label": label, "dropped": jnp.where(drop, null, label), "concat": concat}

    def _condition(self, params: Params, frozen: Params, example: dict, label: Array) -> tuple[Params, dict]:
        """(parameters of the model, conditioning arguments of the denoiser)."""
        params = self.trainable.merge(frozen, params)
        rows = jax.tree.map(lambda rows: rows[label], frozen["table"])
        return params, self.model.conditioning.encode(params.get("conditioning"), rows) | example["concat"]

    def _predict(self, params: Params, frozen: Params, example: dict, label: Array) -> tuple:
        """(output for the training target, var_frac of a learned variance or None)."""
        params, cond = self._condition(params, frozen, example, label)
        output = apply_denoiser(self.model, params, example["z_t"], example["t"], cond)
        if not self.model.learned_variance:
            return output, None
        output, variance = jnp.split(output, 2, axis=-1)
        return output, to_var_frac(variance)

    def _simple_loss(self, output: Array, example: dict, weighting: str) -> Array:
        """The weighted squared error of each example, [B]."""
        options = {"process": self.model.process, "prediction": self.model.prediction, "gamma": self.snr_gamma}
        return diffusion_loss(output, example["z0"], example["eps"], example["t"], weighting=weighting, **options)

    def _loss(self, params: Params, frozen: Params, example: dict, axis_name: str | None) -> tuple[Array, Metrics]:
        model = self.model
        output, var_frac = self._predict(params, frozen, example, example["dropped"])
        simple = self._simple_loss(output, example, self.weighting).mean()
        if var_frac is None:
            return simple, {}
        options = {"prediction": model.prediction, "process": model.process, "num_bins": model.num_bins}
        terms = variance_loss(output, var_frac, example["z0"], example["z_t"], example["t"], **options)
        vlb = len(model.process) * terms.mean()
        return simple + self.vlb_weight * vlb, {"simple": simple, "vlb": vlb}


def choose_caption(captions: Array, label: Array, keys: Array) -> Array:
    """The table row [B] of a random caption of each label; captions int32 [P, k], label [B], keys [B]."""
    k = jax.vmap(lambda key: jax.random.randint(key, (), 0, captions.shape[1]))(keys)
    return captions[label, k]
