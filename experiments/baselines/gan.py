"""A class-conditional GAN of DCGAN's size (Radford 2016): hinge (Lim & Ye 2017) or non-saturating loss (Goodfellow
2014), with the R1 gradient penalty (Mescheder 2018), spectral norm (Miyato 2018) or both."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.baselines.squeeze import squeeze, unsqueeze
from experiments.baselines.stage import STREAM
from ldm_jax.diffusion.random import example_keys
from ldm_jax.models.pixels import to_pixels, to_uint8
from ldm_jax.training.state import TrainState, ema_update, update_if

LOSSES = ("hinge", "non_saturating")
NETWORKS = ("generator", "discriminator")
SINGULAR = "singular"  # collection of spectral norm's singular vectors, which no optimizer updates


class Generator(nn.Module):
    """The generator: noise [B, latent] and labels [B] -> images [B, H, W, C] in [-1, 1]; H and W are multiples of 4.

    Upsampling is by pixel shuffle (Shi 2016), not by strided convolutions, whose gradients XLA compiles to code that is
    many times slower on a CPU.
    """

    num_classes: int
    shape: tuple[int, int, int]
    features: int = 64
    latent: int = 64

    @nn.compact
    def __call__(self, z: jax.Array, label: jax.Array) -> jax.Array:
        f, (height, width, channels) = self.features, self.shape
        hidden = jnp.concatenate([z, nn.Embed(self.num_classes, self.latent)(label)], axis=-1)
        hidden = nn.Dense(height // 4 * (width // 4) * 2 * f)(hidden).reshape(len(z), height // 4, width // 4, 2 * f)
        for out_features in (f, f // 2):
            hidden = nn.relu(nn.GroupNorm(8, use_fast_variance=False)(hidden))
            hidden = unsqueeze(nn.Conv(4 * out_features, (3, 3))(hidden))
        hidden = nn.relu(nn.GroupNorm(8, use_fast_variance=False)(hidden))
        return jnp.tanh(nn.Conv(channels, (3, 3))(hidden))


class Discriminator(nn.Module):
    """The projection discriminator (Miyato & Koyama 2018): images [B, H, W, C] and labels [B] -> logits [B].

    With `spectral_norm` each layer's weights are divided by their largest singular value, estimated by one power
    iteration per call; calls with `update_stats` store the singular vectors in the collection SINGULAR.
    """

    num_classes: int
    features: int = 64
    spectral_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array, update_stats: bool = False) -> jax.Array:
        def normed(layer: nn.Module) -> Callable[[jax.Array], jax.Array]:
            if not self.spectral_norm:
                return layer
            return partial(nn.SpectralNorm(layer, collection_name=SINGULAR), update_stats=update_stats)

        hidden = squeeze(x)
        hidden = squeeze(nn.leaky_relu(normed(nn.Conv(self.features, (3, 3)))(hidden), 0.2))
        for _ in range(2):
            hidden = nn.leaky_relu(normed(nn.Conv(2 * self.features, (3, 3)))(hidden), 0.2)
        pooled = hidden.sum(axis=(1, 2)) / hidden.shape[1]
        class_embedding = normed(nn.Embed(self.num_classes, pooled.shape[-1]))(label)
        return normed(nn.Dense(1))(pooled)[:, 0] + (class_embedding * pooled).sum(axis=-1)


class Adam(NamedTuple):
    """Adam (Kingma & Ba 2015) with a constant learning rate."""

    learning_rate: float
    b1: float
    b2: float


@dataclass(frozen=True)
class GANStage:
    """The training stage of a GAN: each step updates both networks by one batch, from the same parameters.

    A batch holds `x` [B, H, W, C] uint8, and `label` and `id` [B] int32. There are no frozen parameters.

    Attributes:
      generator, discriminator: the networks.
      loss: one of LOSSES.
      r1: gamma, the weight of the gradient penalty; 0 for none.
      adam: optimizer of both networks.
      ema_decay: of the generator's EMA parameters.
    """

    generator: Generator
    discriminator: Discriminator
    loss: str
    r1: float
    adam: Adam
    ema_decay: float

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r}: must be one of {', '.join(LOSSES)}")

    def init(self, rng: jax.Array) -> TrainState:
        """The state before the first update."""
        keys, label = jax.random.split(rng), jnp.zeros((1,), jnp.int32)
        discriminator = self.discriminator.init(keys[1], jnp.zeros((1, *self.generator.shape)), label)
        params = {
            "generator": self.generator.init(keys[0], jnp.zeros((1, self.generator.latent)), label)["params"],
            "discriminator": discriminator["params"],
            SINGULAR: discriminator.get(SINGULAR, {}),
        }
        opt_state = {name: optax.adam(*self.adam).init(params[name]) for name in NETWORKS}
        ema_params = {"generator": jax.tree.map(jnp.copy, params["generator"])}
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, opt_state)

    def step(
        self, state: TrainState, frozen: dict, batch: dict, seed: jax.Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after one update of each network, and scalar metrics."""
        losses, grads, singular = self._gradients(state.params, batch, seed)  # singular: equal on all devices
        if axis_name is not None:
            losses, grads = jax.lax.pmean((losses, grads), axis_name)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(losses["generator"] + losses["discriminator"] + norm) & (batch["step"] == state.step)
        new = update_if(good, self._update, state, grads, singular)
        return new, {"loss": losses["generator"], "discriminator": losses["discriminator"], "grad_norm": norm}

    def _update(self, state: TrainState, grads: Any, singular: Any) -> TrainState:
        """The state after one update of each network."""
        params, opt_state = {SINGULAR: singular}, {}
        for name in NETWORKS:
            old = state.params[name]
            updates, opt_state[name] = optax.adam(*self.adam).update(grads[name], state.opt_state[name], old)
            params[name] = optax.apply_updates(old, updates)
        ema = ema_update(state.ema_params, {"generator": params["generator"]}, state.step, self.ema_decay)
        return TrainState(state.step + 1, params, ema, opt_state)

    def trace(self, state: TrainState, frozen: dict, batch: dict, seed: jax.Array) -> dict[str, Any]:
        """The tensors of the step by name, to report the first that is not finite."""
        losses, grads, _ = self._gradients(state.params, batch, seed)
        return {"params": state.params, "losses": losses, "gradient": grads}

    def _gradients(self, params: Any, batch: dict, seed: jax.Array) -> tuple[dict, dict, Any]:
        """Losses and gradients of both networks, and the updated singular vectors."""
        keys = jax.vmap(jax.random.split)(example_keys(seed, STREAM, batch["step"], batch["id"]))
        x, label = to_pixels(batch["x"]), batch["label"]
        generator, discriminator, singular = params["generator"], params["discriminator"], params[SINGULAR]
        fake = self._generate(generator, label, keys[:, 0])
        discriminator_value_and_grad = jax.value_and_grad(self._discriminator_loss, has_aux=True)
        (d_loss, new_singular), d_grads = discriminator_value_and_grad(discriminator, singular, x, fake, label)
        g_loss, g_grads = jax.value_and_grad(self._generator_loss)(
            generator, discriminator, singular, label, keys[:, 1]
        )
        losses = {"discriminator": d_loss, "generator": g_loss}
        return losses, {"discriminator": d_grads, "generator": g_grads}, new_singular

    def _generate(self, params: Any, label: jax.Array, keys: jax.Array) -> jax.Array:
        z = jax.vmap(lambda key: jax.random.normal(key, (self.generator.latent,)))(keys)
        return self.generator.apply({"params": params}, z, label)

    def _logits(self, params: Any, singular: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        return self.discriminator.apply({"params": params, SINGULAR: singular}, x, label)

    def _discriminator_loss(
        self, params: Any, singular: Any, x: jax.Array, fake: jax.Array, label: jax.Array
    ) -> tuple[jax.Array, Any]:
        """The loss, and the singular vectors updated by the forward pass."""
        both, labels = jnp.concatenate([x, fake]), jnp.tile(label, 2)
        logits, updated = self.discriminator.apply(
            {"params": params, SINGULAR: singular}, both, labels, update_stats=True, mutable=[SINGULAR]
        )
        real_logits, fake_logits = jnp.split(logits, 2)
        if self.loss == "hinge":
            value = nn.relu(1.0 - real_logits).mean() + nn.relu(1.0 + fake_logits).mean()
        else:
            value = nn.softplus(-real_logits).mean() + nn.softplus(fake_logits).mean()
        if self.r1:
            gradient = jax.grad(lambda x: self._logits(params, singular, x, label).sum())(x)
            value += 0.5 * self.r1 * (gradient**2).sum(axis=(1, 2, 3)).mean()
        return value, updated.get(SINGULAR, {})

    def _generator_loss(
        self, params: Any, discriminator: Any, singular: Any, label: jax.Array, keys: jax.Array
    ) -> jax.Array:
        fake_logits = self._logits(discriminator, singular, self._generate(params, label, keys), label)
        return -fake_logits.mean() if self.loss == "hinge" else nn.softplus(-fake_logits).mean()


def sample(generator: Generator, params: Any, label: jax.Array, keys: jax.Array) -> jax.Array:
    """Samples: images uint8 [N, H, W, C] of these labels [N], each with its own key [N]."""
    z = jax.vmap(lambda key: jax.random.normal(key, (generator.latent,)))(keys)
    return to_uint8(generator.apply({"params": params}, z, label))
