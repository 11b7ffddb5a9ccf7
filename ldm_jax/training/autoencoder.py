"""Stage 1, the autoencoder (Esser 2021; Rombach 2022, appendix G): reconstruction, perceptual, KL or codebook, and
patch-adversarial loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ldm_jax.diffusion.random import Stream, example_keys
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.first_stage import kl_divergence, sample_posterior
from ldm_jax.models.perceptual import LPIPS
from ldm_jax.models.pixels import flip_images, to_pixels
from ldm_jax.models.quantizer import perplexity
from ldm_jax.training.accumulation import mean_over_micro_batches
from ldm_jax.training.optimizer import Optimization, make_optimizer
from ldm_jax.training.state import Metrics, TrainState, ema_update, update_if

LAST_LAYER = ("decoder", "conv_out", "kernel")
MAX_ADVERSARIAL_WEIGHT = 1e4


class LossWeights(NamedTuple):
    """The weights of the loss terms; see config/defaults.py."""

    reconstruction: float
    perceptual: float
    adversarial: float
    kl: float
    codebook: float
    commitment: float


@dataclass(frozen=True)
class AutoencoderStage:
    """Training of an autoencoder as pure functions.

    A batch holds `x` [B, H, W, C] uint8 and `id` [B] int32; `frozen` is {"lpips": parameters of the perceptual net}.

    Attributes:
      autoencoder: with KL or codebook regularization.
      discriminator, lpips: None = without that term.
      weights: of the loss terms.
      perceptual_every: LPIPS is computed on the examples whose `id` is a multiple of this, which divides the batch
        size: an unbiased estimate at a fraction of the cost, the same on any number of devices.
      image_shape: (H, W, C).
      flip: random horizontal flips.
      optimization, discriminator_optimization: the optimizers and learning rates.
      ema_decay: of the EMA of the autoencoder's parameters.
      accumulate: micro-batches of a device's batch; 1 with the adversarial loss, whose weight is of the whole batch.
    """

    autoencoder: AutoencoderKL | VQModel
    discriminator: PatchDiscriminator | None
    lpips: LPIPS | None
    weights: LossWeights
    perceptual_every: int
    image_shape: tuple[int, int, int]
    flip: bool
    optimization: Optimization
    discriminator_optimization: Optimization
    ema_decay: float
    accumulate: int = 1

    def init(self, rng: Array) -> TrainState:
        """The state before the first update."""
        rng_autoencoder, rng_discriminator = jax.random.split(rng)
        x = jnp.zeros((1, *self.image_shape))
        params = {"autoencoder": self.autoencoder.init(rng_autoencoder, x)["params"]}
        opt_state = {"autoencoder": make_optimizer(self.optimization).init(params["autoencoder"])}
        if self.discriminator is not None:
            params["discriminator"] = self.discriminator.init(rng_discriminator, x)["params"]
            opt_state["discriminator"] = make_optimizer(self.discriminator_optimization).init(params["discriminator"])
        ema_params = {"autoencoder": jax.tree.map(jnp.copy, params["autoencoder"])}
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, opt_state)

    def step(
        self,
        state: TrainState,
        frozen: dict,
        batch: dict,
        seed: Array,
        *,
        perceptual: bool = True,
        adversarial: bool = True,
        axis_name: str | None = None,
    ) -> tuple[TrainState, Metrics]:
        """The state after one update, and scalar metrics.

        `perceptual` and `adversarial` are compiled in. Without the first LPIPS is left out; without the second the
        discriminator neither takes part nor is trained.
        """
        mean = partial(jax.lax.pmean, axis_name=axis_name) if axis_name is not None else lambda tree: tree
        params, discriminator = state.params["autoencoder"], state.params.get("discriminator")

        def gradients(batch: dict) -> tuple[Metrics, dict]:
            x, x_hat, features, loss, metrics, at_x_hat, pull_back = self._forward(
                params, frozen, batch, seed, perceptual
            )
            metrics |= {"loss": loss}
            grads = {}
            if discriminator is not None and adversarial:
                generator, grads["discriminator"], terms = self._adversarial_gradients(discriminator, x, x_hat)
                pull_last = self._pull_back_to_last_layer(params, features)
                rec_norm, adversarial_norm = map(jnp.linalg.norm, mean((pull_last(at_x_hat), pull_last(generator))))
                # |grad of the reconstruction loss| / |grad of D|, both at the last layer (Esser 2021, eq. 7)
                adaptive = jnp.minimum(rec_norm / (adversarial_norm + 1e-4), MAX_ADVERSARIAL_WEIGHT)
                weight = self.weights.adversarial * adaptive
                at_x_hat += weight * generator
                metrics |= terms | {"adversarial_weight": weight}
            return metrics, grads | {"autoencoder": pull_back(at_x_hat)}

        metrics, grads = mean(mean_over_micro_batches(gradients, batch, self.accumulate, block=self.perceptual_every))
        metrics |= {"grad_norm": optax.tree.norm(grads["autoencoder"])}
        if "usage" in metrics:  # [K] of the codebook
            usage = metrics.pop("usage")
            metrics |= {"codes_used": (usage > 0).mean(), "perplexity": perplexity(usage)}
        finite = [jnp.isfinite(metrics[name]) for name in ("loss", "grad_norm", "discriminator") if name in metrics]
        good = jnp.stack(finite).all() & (batch["step"] == state.step)
        return update_if(good, self._update, state, grads), metrics

    def _update(self, state: TrainState, grads: dict) -> TrainState:
        """The state after one update; without a gradient of the discriminator that stays as it is."""
        params, opt_state = dict(state.params), dict(state.opt_state)
        for name, gradient in grads.items():
            optimizer = make_optimizer(self.optimization if name == "autoencoder" else self.discriminator_optimization)
            updates, opt_state[name] = optimizer.update(gradient, state.opt_state[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
        ema = ema_update(state.ema_params["autoencoder"], params["autoencoder"], state.step, self.ema_decay)
        return TrainState(state.step + 1, params, {"autoencoder": ema}, opt_state)

    def trace(self, state: TrainState, frozen: dict, batch: dict, seed: Array) -> dict[str, Any]:
        """The tensors of the step by name, in the order of their computation; see `loop.first_nonfinite`."""
        params = state.params["autoencoder"]
        x, x_hat, features, loss, terms, at_x_hat, pull_back = self._forward(params, frozen, batch, seed)
        tensors = {"params": state.params, "x": x, "features": features, "x_hat": x_hat, "terms": terms}
        if self.discriminator is not None:
            tensors["discriminator"] = self._logits(state.params["discriminator"], x_hat)
        return tensors | {"loss": loss, "gradient": pull_back(at_x_hat)}

    def _forward(self, params: dict, frozen: dict, batch: dict, seed: Array, perceptual: bool = True) -> tuple:
        """The loss without its adversarial term: (x, x_hat, features, loss, metrics, its gradient at x_hat, pull_back).

        `pull_back` maps the gradient of all terms at x_hat to that of the loss at the parameters. It is linear, so that
        one backward pass through the autoencoder serves all terms.
        """
        keys = example_keys(seed, Stream.AUTOENCODER, batch["step"], batch["id"])
        key_flip, key_raw = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x = to_pixels(batch["x"])
        x = flip_images(x, key_flip) if self.flip else x
        reconstruct = partial(self._reconstruct, x=x, keys=key_raw)
        (x_hat, regularizer), pull_back, (features, metrics) = jax.vjp(reconstruct, params, has_aux=True)
        (loss, terms), at_x_hat = self._reconstruction_gradient(x_hat, x, batch["id"], frozen, perceptual)
        to_params = lambda at_x_hat: pull_back((at_x_hat, jnp.ones_like(regularizer)))[0]  # noqa: E731
        return x, x_hat, features, loss + regularizer, metrics | terms, at_x_hat, to_params

    def _reconstruct(self, params: dict, x: Array, keys: Array) -> tuple[tuple, tuple]:
        """((x_hat, regularizer), (features before the last layer, metrics))."""
        autoencoder, weights = partial(self.autoencoder.apply, {"params": params}), self.weights
        code = autoencoder(x, method="encode")
        if isinstance(self.autoencoder, AutoencoderKL):
            raw = sample_posterior(code, keys)
            kl = kl_divergence(code).mean() / x[0].size
            regularizer, metrics = weights.kl * kl, {"kl": kl}
        else:
            raw, _, codebook, commitment, usage = autoencoder(code, method="quantize")
            regularizer = weights.codebook * codebook + weights.commitment * commitment
            metrics = {"codebook": codebook, "commitment": commitment, "usage": usage}
        features = autoencoder(raw, method="decode_features")
        return (autoencoder(features, method="to_pixels"), regularizer), (features, metrics)

    def _reconstruction_gradient(self, x_hat: Array, x: Array, ids: Array, frozen: dict, perceptual: bool) -> tuple:
        """((reconstruction and perceptual loss, metrics), its gradient at x_hat)."""

        def loss(x_hat: Array) -> tuple[Array, dict]:
            l1 = jnp.abs(x - x_hat).mean()
            loss, metrics = self.weights.reconstruction * l1, {"l1": l1}
            if self.lpips is not None and perceptual:
                metrics["perceptual"] = self._perceptual(x_hat, x, ids, frozen["lpips"])
                loss += self.weights.perceptual * metrics["perceptual"]
            return loss, metrics

        return jax.value_and_grad(loss, has_aux=True)(x_hat)

    def _perceptual(self, x_hat: Array, x: Array, ids: Array, lpips_params: Any) -> Array:
        """The mean LPIPS of every k-th example; the mean over the devices is that over the batch."""
        n, every = len(ids), self.perceptual_every
        some = -ids[0] % every + jnp.arange(0, n, every)  # ids are consecutive
        distance = self.lpips.apply({"params": lpips_params}, x[some % n], x_hat[some % n])
        # A device with fewer than `every` examples may have none; what it computed instead does not count.
        return jnp.where(some < n, distance, 0.0).sum() * every / n

    def _logits(self, params: dict, x: Array) -> Array:
        return self.discriminator.apply({"params": params}, x)

    def _adversarial_gradients(self, params: dict, x: Array, x_hat: Array) -> tuple:
        """(gradient at x_hat of the generator loss -E[D(x_hat)], gradient of the discriminator, metrics)."""

        def discriminator_loss(params: dict) -> tuple[Array, dict]:
            """Hinge loss (Lim & Ye 2017): E[max(0, 1 - D(x))] / 2 + E[max(0, 1 + D(x_hat))] / 2."""
            real, fake = jnp.split(self._logits(params, jnp.concatenate([x, x_hat])), 2)
            loss = 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())
            return loss, {"logits_real": real.mean(), "logits_fake": fake.mean()}

        generator = jax.grad(lambda x_hat: -self._logits(params, x_hat).mean())(x_hat)
        (loss, metrics), grads = jax.value_and_grad(discriminator_loss, has_aux=True)(params)
        return generator, grads, {"discriminator": loss} | metrics

    def _pull_back_to_last_layer(self, params: dict, features: Array) -> Callable[[Array], Array]:
        """A function from a gradient at x_hat to that at the last layer's kernel, without the rest of the network."""
        module, layer, leaf = LAST_LAYER

        def to_pixels(kernel: Array) -> Array:
            last = params[module][layer] | {leaf: kernel}
            replaced = params | {module: params[module] | {layer: last}}
            return self.autoencoder.apply({"params": replaced}, features, method="to_pixels")

        _, pull_back = jax.vjp(to_pixels, params[module][layer][leaf])
        return lambda at_x_hat: pull_back(at_x_hat)[0]
