"""Stage 1, the autoencoder (Esser 2021, Rombach 2022 appendix G): reconstruction, perceptual, KL or codebook, and
patch-adversarial loss, in one pure step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from ldm_jax.diffusion.random import Stream, example_keys
from ldm_jax.models.first_stage import draw, kl_divergence
from ldm_jax.models.pixels import flip_images, to_pixels
from ldm_jax.models.quantizer import perplexity
from ldm_jax.training.state import TrainState, ema_update, keep_if


class AutoencoderStage(NamedTuple):
    """The pure functions of stage 1. `frozen` is {"lpips": parameters of the perceptual net}."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    trace: Callable[..., dict[str, Any]]


def make_autoencoder_stage(
    *,
    autoencoder: nn.Module,
    kind: str,
    discriminator: nn.Module | None,
    lpips: nn.Module | None,
    image_shape: tuple[int, int, int],
    weights: Mapping[str, float],
    perceptual_every: int,
    flip: bool,
    optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> AutoencoderStage:
    """Builds the stage. `weights` has reconstruction, perceptual, adversarial, and kl, or codebook and commitment.

    `lpips` or `discriminator` None leaves that term out. A batch holds `x` [B, H, W, C] uint8 and `id` [B] int32.
    LPIPS is measured on the examples whose `id` is a multiple of `perceptual_every`, which divides the whole batch: an
    unbiased estimate at a fraction of its cost, the same on any number of devices. The step's `adversarial` is compiled
    in: with False the discriminator neither takes part nor learns.
    """
    last_layer = ("decoder", "conv_out", "kernel")

    def init(rng: jax.Array) -> TrainState:
        rng_autoencoder, rng_discriminator = jax.random.split(rng)
        x = jnp.zeros((1, *image_shape))
        params = {"autoencoder": autoencoder.init(rng_autoencoder, x)["params"]}
        opt_state = {"autoencoder": optimizer.init(params["autoencoder"])}
        if discriminator is not None:
            params["discriminator"] = discriminator.init(rng_discriminator, x)["params"]
            opt_state["discriminator"] = discriminator_optimizer.init(params["discriminator"])
        ema_params = {"autoencoder": jax.tree.map(jnp.copy, params["autoencoder"])}
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, opt_state)

    def prepare(batch: dict, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(pixels x, one key an example for its latent)."""
        keys = example_keys(seed, Stream.AUTOENCODER, batch["step"], batch["id"])
        key_flip, key_raw = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x = to_pixels(batch["x"])
        return flip_images(x, key_flip) if flip else x, key_raw

    def reconstruct(params: dict, x: jax.Array, keys: jax.Array) -> tuple[tuple, tuple]:
        """((x_hat, regularizer), (features before the last layer, metrics))."""
        code = autoencoder.apply({"params": params}, x, method="encode")
        if kind == "kl":
            raw = draw(code, keys)
            kl = kl_divergence(code).mean() / x[0].size
            regularizer, metrics = weights["kl"] * kl, {"kl": kl}
        else:
            raw, _, codebook, commitment, usage = autoencoder.apply({"params": params}, code, method="quantize")
            regularizer = weights["codebook"] * codebook + weights["commitment"] * commitment
            metrics = {"codebook": codebook, "commitment": commitment, "usage": usage}
        features = autoencoder.apply({"params": params}, raw, method="decode_features")
        x_hat = autoencoder.apply({"params": params}, features, method="to_pixels")
        return (x_hat, regularizer), (features, metrics)

    def perceptual(x_hat: jax.Array, x: jax.Array, ids: jax.Array, lpips_params: Any) -> jax.Array:
        """Mean LPIPS of the examples that have their turn; the mean over the devices is that over the batch."""
        n = len(ids)
        some = -ids[0] % perceptual_every + jnp.arange(0, n, perceptual_every)  # ids follow one another
        distance = lpips.apply({"params": lpips_params}, x[some % n], x_hat[some % n])
        # A device with fewer than `perceptual_every` examples may have none; what it measured instead does not count.
        return jnp.where(some < n, distance, 0.0).sum() * perceptual_every / n

    def reconstruction_loss(
        x_hat: jax.Array, x: jax.Array, ids: jax.Array, lpips_params: Any
    ) -> tuple[jax.Array, dict]:
        l1 = jnp.abs(x - x_hat).mean()
        loss, metrics = weights["reconstruction"] * l1, {"l1": l1}
        if lpips is not None:
            metrics["perceptual"] = perceptual(x_hat, x, ids, lpips_params)
            loss += weights["perceptual"] * metrics["perceptual"]
        return loss, metrics

    def logits(params: dict, x: jax.Array) -> jax.Array:
        return discriminator.apply({"params": params}, x)

    def discriminator_loss(params: dict, x: jax.Array, x_hat: jax.Array) -> tuple[jax.Array, dict]:
        """Hinge loss (Lim & Ye 2017): E[max(0, 1 - D(x))] / 2 + E[max(0, 1 + D(x_hat))] / 2."""
        real, fake = jnp.split(logits(params, jnp.concatenate([x, x_hat])), 2)
        loss = 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())
        return loss, {"logits_real": real.mean(), "logits_fake": fake.mean()}

    def adversarial_gradients(params: dict, x: jax.Array, x_hat: jax.Array) -> tuple:
        """Gradient of the generator's loss -E[D(x_hat)] at x_hat, the discriminator's own gradient, and metrics."""
        generator = jax.grad(lambda x_hat: -logits(params, x_hat).mean())(x_hat)
        (loss, metrics), own = jax.value_and_grad(discriminator_loss, has_aux=True)(params, x, x_hat)
        return generator, own, {"discriminator": loss} | metrics

    def step(state, frozen, batch, seed, *, adversarial=True, axis_name=None):
        def mean(tree):
            return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

        x, key_raw = prepare(batch, seed)
        params = state.params["autoencoder"]
        (x_hat, regularizer), pull_back, (features, metrics) = jax.vjp(
            lambda params: reconstruct(params, x, key_raw), params, has_aux=True
        )
        (rec_loss, rec_metrics), at_x_hat = jax.value_and_grad(reconstruction_loss, has_aux=True)(
            x_hat, x, batch["id"], frozen.get("lpips")
        )
        metrics = metrics | rec_metrics | {"loss": rec_loss + regularizer}

        new_params, opt_state = dict(state.params), dict(state.opt_state)
        if discriminator is not None and adversarial:
            old = state.params["discriminator"]
            generator, own, adversarial_metrics = adversarial_gradients(old, x, x_hat)
            # Adaptive weight (Esser 2021, eq. 7): |grad of the reconstruction| / |grad of D| at the last layer.
            pull_last = _pull_last_layer(autoencoder, params, features, last_layer)
            rec_norm, adversarial_norm = map(jnp.linalg.norm, mean((pull_last(at_x_hat), pull_last(generator))))
            weight = weights["adversarial"] * jnp.minimum(rec_norm / (adversarial_norm + 1e-4), 1e4)
            at_x_hat += weight * generator
            updates, opt_state["discriminator"] = discriminator_optimizer.update(
                mean(own), state.opt_state["discriminator"], old
            )
            new_params["discriminator"] = optax.apply_updates(old, updates)
            metrics |= adversarial_metrics | {"adversarial_weight": weight}

        # One backward pass through the autoencoder serves all terms: its gradient is linear in theirs at x_hat.
        (grads,) = pull_back((at_x_hat, jnp.ones_like(regularizer)))
        metrics, grads = mean((metrics, grads))
        metrics["grad_norm"] = optax.tree.norm(grads)
        if "usage" in metrics:  # [K], already the mean over the devices
            metrics["codes_used"] = (metrics["usage"] > 0).mean()
            metrics["perplexity"] = perplexity(metrics.pop("usage"))
        updates, opt_state["autoencoder"] = optimizer.update(grads, state.opt_state["autoencoder"], params)
        new_params["autoencoder"] = optax.apply_updates(params, updates)
        ema = ema_update(state.ema_params["autoencoder"], new_params["autoencoder"], state.step, ema_decay)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"]) & (batch["step"] == state.step)
        if "discriminator" in metrics:
            good &= jnp.isfinite(metrics["discriminator"])
        return keep_if(good, TrainState(state.step + 1, new_params, {"autoencoder": ema}, opt_state), state), metrics

    def trace(state, frozen, batch, seed) -> dict[str, Any]:
        """Every tensor of the step in the order it arises, by name: for the report on the first that is not finite."""
        (x, key_raw), params = prepare(batch, seed), state.params["autoencoder"]
        (x_hat, regularizer), pull_back, (features, metrics) = jax.vjp(
            lambda params: reconstruct(params, x, key_raw), params, has_aux=True
        )
        (loss, terms), at_x_hat = jax.value_and_grad(reconstruction_loss, has_aux=True)(
            x_hat, x, batch["id"], frozen.get("lpips")
        )
        (grads,) = pull_back((at_x_hat, jnp.ones_like(regularizer)))
        seen = {"params": state.params, "x": x, "features": features, "x_hat": x_hat, "terms": metrics | terms}
        if discriminator is not None:
            seen["discriminator"] = logits(state.params["discriminator"], x_hat)
        return seen | {"loss": loss + regularizer, "gradient": grads}

    return AutoencoderStage(init, step, trace)


def _pull_last_layer(autoencoder: nn.Module, params: dict, features: jax.Array, path: tuple) -> Callable:
    """Maps a gradient at x_hat to the last layer's kernel, without a pass through the rest of the network."""
    module, layer, leaf = path

    def to_pixels(kernel: jax.Array) -> jax.Array:
        last = params[module][layer] | {leaf: kernel}
        replaced = params | {module: params[module] | {layer: last}}
        return autoencoder.apply({"params": replaced}, features, method="to_pixels")

    _, pull_back = jax.vjp(to_pixels, params[module][layer][leaf])
    return lambda at_x_hat: pull_back(at_x_hat)[0]
