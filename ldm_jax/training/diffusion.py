"""Stage 2, the diffusion model: one pure step over (state, frozen, batch, seed), its validation and its trace."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldm_jax.diffusion.denoiser import to_var_frac
from ldm_jax.diffusion.losses import diffusion_loss, variance_loss
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import Stream, example_keys, split_keys
from ldm_jax.models.concat_conditioning import MapCondition
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.pipeline.trainable import Network
from ldm_jax.training.noising import make_noising
from ldm_jax.training.state import TrainState, update_if_finite

# (maps [B, h, w, k], keys [B]) -> the maps as the UNet sees them, and the arguments by which it is told what was done.
Augment = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class DiffusionStage(NamedTuple):
    """The pure functions of stage 2. `frozen` are arrays that do not learn: {"autoencoder", "shift", "scale"}, and what
    the network wants."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    validate: Callable[..., dict[str, jax.Array]]
    trace: Callable[..., dict[str, Any]]


def make_diffusion_stage(
    *,
    network: Network,
    map_condition: MapCondition | None,
    first_stage: FirstStage,
    latent_shape: tuple[int, int, int],
    process: Process,
    prediction: str,
    weighting: str,
    snr_gamma: float,
    label_dropout: float,
    flip: bool,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    bound_weight: float = 0.0,
    levels: int | None = None,
    augment: Augment | None = None,
) -> DiffusionStage:
    """Builds the stage for the loss of Ho 2020, eq. 14 (Rombach 2022, eq. 3), generalised to v and z0.

    With a `bound_weight` (lambda of Nichol 2021, eq. 16) the variance is learned: the UNet's second half of channels is
    its spread, and the loss L_simple + bound_weight L_vlb. `levels` is that of `likelihood.vlb_term`.
    `augment` is what a map goes through before the UNet sees it (Ho 2022, section 4).

    A batch holds `id` [B] int32, `label` [B] int32 (absent in unlabelled sets) and either `moments`
    [B, F, h, w, 2c] from the cache (F = 2 with the flipped image's, else 1) or `x` [B, H, W, C] uint8; with a map
    condition it is `x`, and `segments` [B, H, W, 1] uint8 where that is the map.
    """
    add_noise = make_noising(first_stage=first_stage, process=process, flip=flip)

    def init(rng: jax.Array) -> TrainState:
        params = network.init(rng)
        ema_params = jax.tree.map(jnp.copy, params)  # a copy: donating one buffer twice is an error
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))

    def predict(params: Any, frozen: dict, example: dict, label: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        told = network.tell(params, frozen, label) | example["told"]
        unet_params = network.unet(params, frozen)
        output = network.module.apply({"params": unet_params}, example["seen"], example["t"], **told)
        if not bound_weight:
            return output, None
        output, variance = jnp.split(output, 2, axis=-1)
        return output, to_var_frac(variance)

    def noised(batch: dict, frozen: dict, keys: jax.Array, t: jax.Array | None = None) -> dict:
        """Everything the loss needs; `t` is drawn uniformly from [0, T) unless given."""
        *noising_keys, key_label, key_map = split_keys(keys, 5)
        example = add_noise(batch, frozen, noising_keys, t)
        label = batch.get("label", jnp.full(example["t"].shape, network.null, jnp.int32))
        if network.choose:
            key_label, key_choice = split_keys(key_label, 2)
            label = network.choose(frozen, label, key_choice)
        dropped = jax.vmap(partial(jax.random.bernoulli, p=label_dropout))(key_label)
        seen, told = example["z_t"], {}
        if map_condition:
            key_known, key_augment = split_keys(key_map, 2) if augment else (key_map, None)
            beside = map_condition.to_map(frozen, map_condition.know(example, key_known))
            if augment:
                beside, told = augment(beside, key_augment)
            seen = jnp.concatenate([seen, beside], axis=-1)
        dropped = jnp.where(dropped, network.null, label)
        return example | {"seen": seen, "told": told, "label": label, "dropped": dropped}

    per_example = partial(diffusion_loss, process=process, prediction=prediction)

    def loss_fn(params: Any, frozen: dict, example: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        z0, z_t, t = example["z0"], example["z_t"], example["t"]
        output, var_frac = predict(params, frozen, example, example["dropped"])
        simple = per_example(output, z0, example["eps"], t, weighting=weighting, gamma=snr_gamma).mean()
        if var_frac is None:
            return simple, {}
        terms = variance_loss(output, var_frac, z0, z_t, t, prediction=prediction, process=process, num_bins=levels)
        bound = len(process) * terms.mean()
        return simple + bound_weight * bound, {"simple": simple, "bound": bound}

    def step(state, frozen, batch, seed, *, axis_name=None):
        keys = example_keys(seed, Stream.DIFFUSION, batch["step"], batch["id"])
        example = noised(batch, frozen, keys)
        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, example)
        if axis_name is not None:
            loss, terms, grads = jax.lax.pmean((loss, terms, grads), axis_name)
        state, grad_norm = update_if_finite(state, batch["step"], loss, grads, optimizer=optimizer, ema_decay=ema_decay)
        return state, {"loss": loss, "grad_norm": grad_norm} | terms

    def validate(params, frozen, batch, seed):
        """{"loss": unweighted, of each example [B]} at the batch's own timesteps `t` [B]; no label is dropped."""
        example = noised(batch, frozen, example_keys(seed, Stream.DIFFUSION_VALIDATION, 0, batch["id"]), batch["t"])
        output, _ = predict(params, frozen, example, example["label"])
        return {"loss": per_example(output, example["z0"], example["eps"], example["t"], weighting="uniform")}

    def trace(state, frozen, batch, seed) -> dict[str, Any]:
        """Every tensor of the step in the order it arises, by name: for the report on the first that is not finite."""
        example = noised(batch, frozen, example_keys(seed, Stream.DIFFUSION, batch["step"], batch["id"]))
        told = network.tell(state.params, frozen, example["dropped"]) | example["told"]
        unet_params = network.unet(state.params, frozen)
        _, seen = network.module.apply(
            {"params": unet_params}, example["seen"], example["t"], **told, capture_intermediates=True
        )
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, example)
        return {"params": state.params, "z0": example["z0"], "z_t": example["z_t"], **told,
                "map": example["seen"][..., latent_shape[-1] :],
                "unet": seen["intermediates"], "loss": loss, "gradient": grads}  # fmt: skip

    return DiffusionStage(init, step, validate, trace)
