"""A GAN the size of DCGAN (Radford 2016), told of classes: hinge (Lim & Ye 2017) or non-saturating loss (Goodfellow
2014), with the gradient penalty R1 (Mescheder 2018), spectral norm (Miyato 2018) or both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.baselines.squeeze import squeeze, unsqueeze
from experiments.baselines.stage import STREAM, Stage
from ldm_jax.diffusion.random import example_keys
from ldm_jax.models.pixels import to_pixels, to_uint8
from ldm_jax.training.state import TrainState, ema_update, keep_if

LOSSES = ("hinge", "non_saturating")
SINGULAR = "singular"  # the vectors of spectral norm, of which parameters and optimizers know nothing


class Generator(nn.Module):
    """Noise [B, latent] and labels [B] -> pictures [B, H, W, C] in [-1, 1]; H and W are multiples of four.

    Sizes change by pixels becoming channels and back (Shi 2016), not by strides: XLA's CPU compiler makes the gradients
    of strided convolutions, and those of these, many times slower than all else.
    """

    num_classes: int
    shape: tuple[int, int, int]
    features: int = 64
    latent: int = 64

    @nn.compact
    def __call__(self, z: jax.Array, label: jax.Array) -> jax.Array:
        f, (height, width, channels) = self.features, self.shape
        told = jnp.concatenate([z, nn.Embed(self.num_classes, self.latent)(label)], axis=-1)
        hidden = nn.Dense(height // 4 * (width // 4) * 2 * f)(told).reshape(len(z), height // 4, width // 4, 2 * f)
        for width_now in (f, f // 2):
            hidden = nn.relu(nn.GroupNorm(8, use_fast_variance=False)(hidden))
            hidden = unsqueeze(nn.Conv(4 * width_now, (3, 3))(hidden))
        hidden = nn.relu(nn.GroupNorm(8, use_fast_variance=False)(hidden))
        return jnp.tanh(nn.Conv(channels, (3, 3))(hidden))


class Discriminator(nn.Module):
    """Pictures [B, H, W, C] and labels [B] -> logits [B]: the projection of Miyato & Koyama 2018.

    With `spectral_norm` each layer's weights are divided by their largest singular value, which one power iteration a
    call goes after: of `learning` calls the collection SINGULAR keeps the vectors.
    """

    num_classes: int
    features: int = 64
    spectral_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array, learning: bool = False) -> jax.Array:
        def normed(layer: nn.Module) -> Callable[[jax.Array], jax.Array]:
            if not self.spectral_norm:
                return layer
            return partial(nn.SpectralNorm(layer, collection_name=SINGULAR), update_stats=learning)

        hidden = squeeze(x)
        hidden = squeeze(nn.leaky_relu(normed(nn.Conv(self.features, (3, 3)))(hidden), 0.2))
        for _ in range(2):
            hidden = nn.leaky_relu(normed(nn.Conv(2 * self.features, (3, 3)))(hidden), 0.2)
        pooled = hidden.sum(axis=(1, 2)) / hidden.shape[1]
        of_class = normed(nn.Embed(self.num_classes, pooled.shape[-1]))(label)
        return normed(nn.Dense(1))(pooled)[:, 0] + (of_class * pooled).sum(axis=-1)


def make_gan_stage(
    *,
    generator: Generator,
    discriminator: Discriminator,
    loss: str,
    r1: float,
    generator_optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> Stage:
    """One step of each in turn. `loss` is one of LOSSES; `r1` is gamma, the weight of the penalty (0: none)."""
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}")
    optimizers = {"generator": generator_optimizer, "discriminator": discriminator_optimizer}

    def init(rng: jax.Array) -> TrainState:
        keys, label = jax.random.split(rng), jnp.zeros((1,), jnp.int32)
        judge = discriminator.init(keys[1], jnp.zeros((1, *generator.shape)), label)
        params = {
            "generator": generator.init(keys[0], jnp.zeros((1, generator.latent)), label)["params"],
            "discriminator": judge["params"],
            SINGULAR: judge.get(SINGULAR, {}),
        }
        opt_state = {name: optimizer.init(params[name]) for name, optimizer in optimizers.items()}
        ema_params = {"generator": jax.tree.map(jnp.copy, params["generator"])}
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, opt_state)

    def made(params: Any, label: jax.Array, keys: jax.Array) -> jax.Array:
        z = jax.vmap(lambda key: jax.random.normal(key, (generator.latent,)))(keys)
        return generator.apply({"params": params}, z, label)

    def logits(params: Any, singular: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        return discriminator.apply({"params": params, SINGULAR: singular}, x, label)

    def discriminator_loss(params: Any, singular: Any, x: jax.Array, fake: jax.Array, label: jax.Array):
        """The loss, and the singular vectors as the pictures' pass has left them."""
        both, labels = jnp.concatenate([x, fake]), jnp.tile(label, 2)
        seen, kept = discriminator.apply(
            {"params": params, SINGULAR: singular}, both, labels, learning=True, mutable=[SINGULAR]
        )
        real_logits, fake_logits = jnp.split(seen, 2)
        if loss == "hinge":
            value = nn.relu(1.0 - real_logits).mean() + nn.relu(1.0 + fake_logits).mean()
        else:
            value = nn.softplus(-real_logits).mean() + nn.softplus(fake_logits).mean()
        if r1:
            slope = jax.grad(lambda x: logits(params, singular, x, label).sum())(x)
            value += 0.5 * r1 * (slope**2).sum(axis=(1, 2, 3)).mean()
        return value, kept.get(SINGULAR, {})

    def generator_loss(params: Any, judge: Any, singular: Any, label: jax.Array, keys: jax.Array) -> jax.Array:
        fake_logits = logits(judge, singular, made(params, label, keys), label)
        return -fake_logits.mean() if loss == "hinge" else nn.softplus(-fake_logits).mean()

    def gradients(params: Any, batch: dict, seed: jax.Array) -> tuple[dict, dict, Any]:
        """(losses, gradients) of both, at the same parameters, and the singular vectors."""
        keys = jax.vmap(jax.random.split)(example_keys(seed, STREAM, batch["step"], batch["id"]))
        x, label = to_pixels(batch["x"]), batch["label"]
        maker, judge, singular = params["generator"], params["discriminator"], params[SINGULAR]
        fake = made(maker, label, keys[:, 0])
        of_judge = jax.value_and_grad(discriminator_loss, has_aux=True)(judge, singular, x, fake, label)
        of_maker = jax.value_and_grad(generator_loss)(maker, judge, singular, label, keys[:, 1])
        (judge_loss, singular), judge_grads = of_judge
        losses = {"discriminator": judge_loss, "generator": of_maker[0]}
        return losses, {"discriminator": judge_grads, "generator": of_maker[1]}, singular

    def step(state, frozen, batch, seed, *, axis_name=None):
        losses, grads, singular = gradients(state.params, batch, seed)  # which are the same on every device
        if axis_name is not None:
            losses, grads = jax.lax.pmean((losses, grads), axis_name)
        params, opt_state = {SINGULAR: singular}, {}
        for name, optimizer in optimizers.items():
            updates, opt_state[name] = optimizer.update(grads[name], state.opt_state[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
        ema = ema_update(state.ema_params, {"generator": params["generator"]}, state.step, ema_decay)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(losses["generator"] + losses["discriminator"] + norm) & (batch["step"] == state.step)
        new = keep_if(good, TrainState(state.step + 1, params, ema, opt_state), state)
        return new, {"loss": losses["generator"], "discriminator": losses["discriminator"], "grad_norm": norm}

    def trace(state, frozen, batch, seed) -> dict[str, Any]:
        losses, grads, _ = gradients(state.params, batch, seed)
        return {"params": state.params, "losses": losses, "gradient": grads}

    return Stage(init, step, trace)


def draw(generator: Generator, params: Any, label: jax.Array, keys: jax.Array) -> jax.Array:
    """Pictures uint8 [N, H, W, C] of these labels [N], each with its own key [N]."""
    z = jax.vmap(lambda key: jax.random.normal(key, (generator.latent,)))(keys)
    return to_uint8(generator.apply({"params": params}, z, label))
