"""A class-conditional normalizing flow with exact densities: RealNVP (Dinh 2017), Glow (Kingma & Dhariwal 2018).

Pixels are dequantized with uniform noise, so the bits per dim are those of a continuous density: an upper bound on
those of the discrete pixels (Theis 2016).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.baselines.squeeze import squeeze, unsqueeze

ALPHA = 0.05  # keeps the logits of black and white finite (Dinh 2017, section 4.1)
CLASS_BIAS = "told"  # the name is part of the key of the initial weights; results.json was measured with this one


class Coupling(nn.Module):
    """One step of the flow (Glow, section 3) or its inverse: actnorm (scale and shift of each channel), an invertible
    1 x 1 convolution and an affine coupling, in which one half of the channels scales and shifts the other."""

    features: int

    @nn.compact
    def __call__(self, z: jax.Array, embedding: jax.Array, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """z [B, h, w, c] -> (z [B, h, w, c], log |det| [B])."""
        pixels, channels = z.shape[1] * z.shape[2], z.shape[-1]
        log_scale = self.param("log_scale", nn.initializers.zeros, (channels,))
        shift = self.param("shift", nn.initializers.zeros, (channels,))
        mix = self.param("mix", nn.initializers.orthogonal(), (channels, channels))
        linear = pixels * (log_scale.sum() + jnp.linalg.slogdet(mix)[1])
        if not inverse:
            z = (z * jnp.exp(log_scale) + shift) @ mix
        fixed, changed = jnp.split(z, 2, axis=-1)
        scale, bias = self.scale_and_bias(fixed, embedding)
        changed = (changed - bias) / scale if inverse else changed * scale + bias
        z = jnp.concatenate([fixed, changed], axis=-1)
        log_det = linear + jnp.log(scale).sum(axis=(1, 2, 3))
        if inverse:
            return ((z @ jnp.linalg.inv(mix)) - shift) * jnp.exp(-log_scale), -log_det
        return z, log_det

    def scale_and_bias(self, fixed: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scale and bias of the coupling: the last layer is zero-initialized, so that the step begins as a rotation."""
        hidden = (
            nn.Conv(self.features, (3, 3), name="conv_in")(fixed)
            + nn.Dense(self.features, name=CLASS_BIAS)(embedding)[:, None, None]
        )
        hidden = nn.Conv(self.features, (1, 1), name="conv_mid")(nn.relu(hidden))
        out = nn.Conv(2 * fixed.shape[-1], (3, 3), name="conv_out", kernel_init=nn.initializers.zeros)(nn.relu(hidden))
        log_scale, bias = jnp.split(out, 2, axis=-1)
        return nn.sigmoid(log_scale + 2.0) + 1e-2, bias


class Flow(nn.Module):
    """A multi-scale flow: `levels` of a squeeze and `steps` couplings; half of the channels leave after each level."""

    num_classes: int
    features: int = 256
    steps: int = 8
    levels: int = 2

    def setup(self) -> None:
        self.embed = nn.Embed(self.num_classes, self.features)
        self.couplings = [[Coupling(self.features) for _ in range(self.steps)] for _ in range(self.levels)]

    def __call__(self, y: jax.Array, label: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """y [B, H, W, C] -> (latents of each level, log |det| [B])."""
        embedding, latents, total = self.embed(label), [], jnp.zeros(len(y))
        for number, couplings in enumerate(self.couplings):
            y = squeeze(y)
            for coupling in couplings:
                y, log_det = coupling(y, embedding)
                total += log_det
            if number < self.levels - 1:
                out, y = jnp.split(y, 2, axis=-1)
                latents.append(out)
        return [*latents, y], total

    def inverse(self, latents: list[jax.Array], label: jax.Array) -> jax.Array:
        """Latents of each level -> y [B, H, W, C]."""
        embedding, y = self.embed(label), latents[-1]
        for number in reversed(range(self.levels)):
            if number < self.levels - 1:
                y = jnp.concatenate([latents[number], y], axis=-1)
            for coupling in reversed(self.couplings[number]):
                y, _ = coupling(y, embedding, inverse=True)
            y = unsqueeze(y)
        return y


def latent_shapes(shape: tuple[int, int, int], levels: int) -> list[tuple[int, int, int]]:
    """The shapes [h, w, c] of the latents of each level, for images [H, W, C]."""
    height, width, channels = shape
    shapes = []
    for number in range(levels):
        height, width, channels = height // 2, width // 2, channels * 4
        if number < levels - 1:
            channels //= 2
        shapes.append((height, width, channels))
    return shapes


def to_logits(images: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 images and noise in [0, 1) of their shape -> (logits y, log |dy/dx| [B]), with x in [0, 256)."""
    p = ALPHA + (1 - 2 * ALPHA) * (images + noise) / 256.0
    log_det = jnp.log((1 - 2 * ALPHA) / 256.0) - jnp.log(p) - jnp.log1p(-p)
    return jnp.log(p) - jnp.log1p(-p), log_det.sum(axis=(1, 2, 3))


def from_logits(y: jax.Array) -> jax.Array:
    """Logits y -> uint8 images."""
    x = (nn.sigmoid(y) - ALPHA) / (1 - 2 * ALPHA) * 256.0
    return jnp.clip(jnp.floor(x), 0, 255).astype(jnp.uint8)


def bits_per_dim(model: Flow, params, images: jax.Array, label: jax.Array, keys: jax.Array) -> jax.Array:
    """Bits per dim [B] of images uint8 [B, H, W, C] dequantized with uniform noise of the keys [B]."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
    y, log_det = to_logits(images, noise)
    latents, flow_log_det = model.apply({"params": params}, y, label)
    normal = sum((-0.5 * (z**2 + jnp.log(2 * jnp.pi))).sum(axis=(1, 2, 3)) for z in latents)
    return -(normal + log_det + flow_log_det) / (images[0].size * jnp.log(2.0))


def sample(
    model: Flow, params, label: jax.Array, keys: jax.Array, shape: tuple[int, int, int], temperature: float = 1.0
) -> jax.Array:
    """Samples: images uint8 [N, H, W, C] of these labels [N], each with its own key [N]."""
    latents = [
        temperature * jax.vmap(lambda key, n=n, s=s: jax.random.normal(jax.random.fold_in(key, n), s))(keys)
        for n, s in enumerate(latent_shapes(shape, model.levels))
    ]
    return from_logits(model.apply({"params": params}, latents, label, method="inverse"))
