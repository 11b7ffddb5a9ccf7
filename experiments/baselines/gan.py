"""A GAN the size of DCGAN (Radford 2016), told of classes: hinge (Lim & Ye 2017) or non-saturating loss (Goodfellow
2014), with the gradient penalty R1 (Mescheder 2018)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.baselines.squeeze import squeeze, unsqueeze
from experiments.baselines.stage import STREAM, Stage
from ldm_jax.data.pixels import to_pixels, to_uint8
from ldm_jax.training.state import TrainState, ema_update, example_keys, keep_if

LOSSES = ("hinge", "non_saturating")


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
    """Pictures [B, H, W, C] and labels [B] -> logits [B]: the projection of Miyato & Koyama 2018."""

    num_classes: int
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array) -> jax.Array:
        hidden = squeeze(x)
        hidden = squeeze(nn.leaky_relu(nn.Conv(self.features, (3, 3))(hidden), 0.2))
        for _ in range(2):
            hidden = nn.leaky_relu(nn.Conv(2 * self.features, (3, 3))(hidden), 0.2)
        pooled = hidden.sum(axis=(1, 2)) / hidden.shape[1]
        return nn.Dense(1)(pooled)[:, 0] + (nn.Embed(self.num_classes, pooled.shape[-1])(label) * pooled).sum(axis=-1)


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
        params = {
            "generator": generator.init(keys[0], jnp.zeros((1, generator.latent)), label)["params"],
            "discriminator": discriminator.init(keys[1], jnp.zeros((1, *generator.shape)), label)["params"],
        }
        opt_state = {name: optimizers[name].init(params[name]) for name in params}
        ema_params = {"generator": jax.tree.map(jnp.copy, params["generator"])}
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, opt_state)

    def made(params: Any, label: jax.Array, keys: jax.Array) -> jax.Array:
        z = jax.vmap(lambda key: jax.random.normal(key, (generator.latent,)))(keys)
        return generator.apply({"params": params}, z, label)

    def logits(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        return discriminator.apply({"params": params}, x, label)

    def discriminator_loss(params: Any, x: jax.Array, fake: jax.Array, label: jax.Array) -> jax.Array:
        real_logits, fake_logits = jnp.split(logits(params, jnp.concatenate([x, fake]), jnp.tile(label, 2)), 2)
        if loss == "hinge":
            value = nn.relu(1.0 - real_logits).mean() + nn.relu(1.0 + fake_logits).mean()
        else:
            value = nn.softplus(-real_logits).mean() + nn.softplus(fake_logits).mean()
        if not r1:
            return value
        slope = jax.grad(lambda x: logits(params, x, label).sum())(x)
        return value + 0.5 * r1 * (slope**2).sum(axis=(1, 2, 3)).mean()

    def generator_loss(params: Any, judge: Any, label: jax.Array, keys: jax.Array) -> jax.Array:
        fake_logits = logits(judge, made(params, label, keys), label)
        return -fake_logits.mean() if loss == "hinge" else nn.softplus(-fake_logits).mean()

    def gradients(params: Any, batch: dict, seed: jax.Array) -> tuple[dict, dict]:
        """(losses, gradients) of both, at the same parameters."""
        keys = jax.vmap(jax.random.split)(example_keys(seed, STREAM, batch["step"], batch["id"]))
        x, label = to_pixels(batch["x"]), batch["label"]
        fake = made(params["generator"], label, keys[:, 0])
        of_judge = jax.value_and_grad(discriminator_loss)(params["discriminator"], x, fake, label)
        of_maker = jax.value_and_grad(generator_loss)(params["generator"], params["discriminator"], label, keys[:, 1])
        both = {"discriminator": of_judge, "generator": of_maker}
        return {name: value for name, (value, _) in both.items()}, {name: grads for name, (_, grads) in both.items()}

    def step(state, frozen, batch, seed, *, axis_name=None):
        losses, grads = gradients(state.params, batch, seed)
        if axis_name is not None:
            losses, grads = jax.lax.pmean((losses, grads), axis_name)
        params, opt_state = {}, {}
        for name, optimizer in optimizers.items():
            updates, opt_state[name] = optimizer.update(grads[name], state.opt_state[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
        ema = ema_update(state.ema_params, {"generator": params["generator"]}, state.step, ema_decay)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(losses["generator"] + losses["discriminator"] + norm) & (batch["step"] == state.step)
        new = keep_if(good, TrainState(state.step + 1, params, ema, opt_state), state)
        return new, {"loss": losses["generator"], "discriminator": losses["discriminator"], "grad_norm": norm}

    def trace(state, frozen, batch, seed) -> dict[str, Any]:
        losses, grads = gradients(state.params, batch, seed)
        return {"params": state.params, "losses": losses, "gradient": grads}

    return Stage(init, step, trace)


def draw(generator: Generator, params: Any, label: jax.Array, keys: jax.Array) -> jax.Array:
    """Pictures uint8 [N, H, W, C] of these labels [N], each with its own key [N]."""
    z = jax.vmap(lambda key: jax.random.normal(key, (generator.latent,)))(keys)
    return to_uint8(generator.apply({"params": params}, z, label))
