"""Stage 2, the diffusion model: one pure step over (state, frozen, batch, seed), its validation and its trace."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.denoiser import to_var_frac
from ldm_jax.diffusion.losses import diffusion_loss, variance_loss
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.models.concat_conditioning import concat_arguments
from ldm_jax.pipeline.model import LatentDiffusion, Params, apply_denoiser
from ldm_jax.pipeline.trainable import Trainable
from ldm_jax.training.noising import add_noise
from ldm_jax.training.state import AdamW, TrainState, init_state, make_optimizer, update_if_finite


@dataclass(frozen=True)
class DiffusionStage:
    """The loss of Ho 2020, eq. 14 (Rombach 2022, eq. 3), for any prediction, as pure functions.

    Of a learned variance the loss is L_simple + vlb_weight L_vlb (Nichol 2021, eq. 16).

    A batch holds `id` [B] int32, `label` [B] int32 (absent in unlabelled sets: the null condition) and either
    `moments` [B, F, h, w, 2c] from the cache (F = 2 with the flipped image's, else 1) or `x` [B, H, W, C] uint8; with
    concat conditioning it is `x`, and `segments` [B, H, W, 1] uint8 where that is made of a segmentation map.

    `frozen` are the arrays that are not trained: what `trainable.frozen` gives of the model's parameters, and
    "table" [K + 1, ...], the rows of the conditioning, whose last is the null condition. Where a label stands for
    several captions, "captions" int32 [P, k] has the rows of each.

    Attributes:
      model, trainable: the model, and which of its parameters are trained.
      weighting, snr_gamma: see `losses.diffusion_loss`.
      label_dropout: probability of the null condition, for classifier-free guidance.
      vlb_weight: lambda of Nichol 2021, eq. 16; of a learned variance only.
      flip: images are mirrored at random.
      adamw, ema_decay: of `state.make_optimizer` and `state.update_if_finite`.
    """

    model: LatentDiffusion
    trainable: Trainable
    weighting: str
    snr_gamma: float
    label_dropout: float
    vlb_weight: float
    flip: bool
    adamw: AdamW
    ema_decay: float

    def init(self, rng: jax.Array, params: Params) -> TrainState:
        """The state before the first update, from the model's parameters."""
        return init_state(self.trainable.init(rng, params), make_optimizer(self.adamw))

    def step(
        self, state: TrainState, frozen: Params, batch: dict, seed: jax.Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update by the batch; the metrics are scalars."""
        example = self._noised(batch, frozen, example_keys(seed, Stream.DIFFUSION, batch["step"], batch["id"]))
        (loss, terms), grads = jax.value_and_grad(self._loss, has_aux=True)(state.params, frozen, example)
        if axis_name is not None:
            loss, terms, grads = jax.lax.pmean((loss, terms, grads), axis_name)
        optimizer = make_optimizer(self.adamw)
        state, grad_norm = update_if_finite(state, batch["step"], loss, grads, optimizer, self.ema_decay)
        return state, {"loss": loss, "grad_norm": grad_norm} | terms

    def validate(self, params: Params, frozen: Params, batch: dict, seed: jax.Array) -> dict[str, jax.Array]:
        """{"loss": unweighted, of each example [B]} at the batch's own timesteps `t` [B]; no label is dropped."""
        keys = example_keys(seed, Stream.DIFFUSION_VALIDATION, 0, batch["id"])
        example = self._noised(batch, frozen, keys, batch["t"])
        output, _ = self._predict(params, frozen, example, example["label"])
        return {"loss": self._per_example(output, example["z0"], example["eps"], example["t"], weighting="uniform")}

    def trace(self, state: TrainState, frozen: Params, batch: dict, seed: jax.Array) -> dict[str, Any]:
        """Every tensor of the step in the order it arises, by name: for the report on the first that is not finite."""
        example = self._noised(batch, frozen, example_keys(seed, Stream.DIFFUSION, batch["step"], batch["id"]))
        z_t, t = example["z_t"], example["t"]
        params, cond = self._condition(state.params, frozen, example, example["dropped"])
        _, tensors = apply_denoiser(self.model, params, z_t, t, cond, capture_intermediates=True)
        (loss, _), grads = jax.value_and_grad(self._loss, has_aux=True)(state.params, frozen, example)
        return {"params": state.params, "z0": example["z0"], "z_t": z_t, **cond,
                "denoiser": tensors["intermediates"], "loss": loss, "gradient": grads}  # fmt: skip

    def _noised(self, batch: dict, frozen: Params, keys: jax.Array, t: jax.Array | None = None) -> dict[str, Any]:
        """Everything the loss needs; `t` is sampled uniformly from [0, T) unless given."""
        *noising_keys, key_label, key_concat = split_keys(keys, 5)
        model, concat = self.model, {}
        example = add_noise(batch, frozen, noising_keys, t, model.first_stage, model.process, flip=self.flip)
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

    def _condition(self, params: Params, frozen: Params, example: dict, label: jax.Array) -> tuple[Params, dict]:
        """The model's parameters, and the denoiser's arguments."""
        params = self.trainable.merge(frozen, params)
        rows = jax.tree.map(lambda rows: rows[label], frozen["table"])
        return params, self.model.conditioning.encode(params.get("conditioning"), rows) | example["concat"]

    def _predict(
        self, params: Params, frozen: Params, example: dict, label: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """The output for the training target, and of a learned variance its interpolation coefficient."""
        params, cond = self._condition(params, frozen, example, label)
        output = apply_denoiser(self.model, params, example["z_t"], example["t"], cond)
        if not self.model.learned_variance:
            return output, None
        output, variance = jnp.split(output, 2, axis=-1)
        return output, to_var_frac(variance)

    def _per_example(
        self, output: jax.Array, z0: jax.Array, eps: jax.Array, t: jax.Array, *, weighting: str
    ) -> jax.Array:
        options = {"process": self.model.process, "prediction": self.model.prediction, "gamma": self.snr_gamma}
        return diffusion_loss(output, z0, eps, t, weighting=weighting, **options)

    def _loss(self, params: Params, frozen: Params, example: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        model, z0, z_t, t = self.model, example["z0"], example["z_t"], example["t"]
        output, var_frac = self._predict(params, frozen, example, example["dropped"])
        simple = self._per_example(output, z0, example["eps"], t, weighting=self.weighting).mean()
        if var_frac is None:
            return simple, {}
        options = {"prediction": model.prediction, "process": model.process, "num_bins": model.num_bins}
        vlb = len(model.process) * variance_loss(output, var_frac, z0, z_t, t, **options).mean()
        return simple + self.vlb_weight * vlb, {"simple": simple, "vlb": vlb}


def choose_caption(captions: jax.Array, label: jax.Array, keys: jax.Array) -> jax.Array:
    """The row of one caption of each label, chosen at random; captions int32 [P, k], label [B], keys [B] -> [B]."""
    k = jax.vmap(lambda key: jax.random.randint(key, (), 0, captions.shape[1]))(keys)
    return captions[label, k]
