"""The baselines by name, in sizes that make all of about as many parameters as latent diffusion has."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.baselines import flow, gan, pixelcnn, vae
from experiments.baselines.stage import Stage, make_stage
from ldm_jax.training.state import make_optimizer

SHAPE, CLASSES = (28, 28, 1), 10
GAN, SPECTRAL = "GAN", "GAN, hinge, spectral norm"


class Model(NamedTuple):
    """A baseline: its stage for so many steps, drawing, and the bits per dim where there are such."""

    stage: Callable[[int], Stage]
    part: str  # of the averaged parameters, what draws: "" = all
    draw: Callable[..., jax.Array]  # (params, labels, keys) -> images
    bits: Callable[..., jax.Array] | None  # (params, images, labels, keys) -> [B]


class Sizes(NamedTuple):
    """Channels and depths; those here make 1.7 million parameters each."""

    pixelcnn: tuple[int, int] = (76, 12)  # features, layers
    flow: tuple[int, int] = (208, 8)  # features, steps of each level
    gan: int = 64
    vae: int = 52


HALF_A_MILLION = Sizes((42, 12), (112, 8), 32, 22)
SMALL = Sizes((16, 2), (16, 1), 16, 16)  # to show that it works


def models(sizes: Sizes) -> dict[str, Model]:
    """Name -> baseline."""
    return gans(sizes.gan) | {
        "PixelCNN": a_pixelcnn(*sizes.pixelcnn),
        "flow": a_flow(*sizes.flow),
        "VAE": a_vae(sizes.vae),
    }


def gans(features: int) -> dict[str, Model]:
    """Two of one architecture: the losses and penalties that GANs are most often steadied by."""
    maker = gan.Generator(CLASSES, SHAPE, features=features)
    fields = {
        GAN: {"loss": "non_saturating", "r1": 1.0},
        SPECTRAL: {"loss": "hinge", "r1": 0.0, "spectral_norm": True},
    }

    def stage(steps: int, *, spectral_norm: bool = False, **losses: Any) -> Stage:
        adam = optax.adam(1e-3, b1=0.0, b2=0.99)
        judge = gan.Discriminator(CLASSES, features=features, spectral_norm=spectral_norm)
        return gan.make_gan_stage(
            generator=maker, discriminator=judge, generator_optimizer=adam, discriminator_optimizer=adam,
            ema_decay=0.99, **losses,
        )  # fmt: skip

    return {
        name: Model(partial(stage, **some), "generator", partial(gan.draw, maker), None)
        for name, some in fields.items()
    }


def a_pixelcnn(features: int, layers: int) -> Model:
    """Its bits are exact, and need no keys."""
    model = pixelcnn.PixelCNN(CLASSES, features, layers)

    def bits(params: Any, images: jax.Array, label: jax.Array, keys: jax.Array) -> jax.Array:
        return pixelcnn.bits_per_dim(model, params, images, label)

    return Model(of_likelihood(model, bits, 2e-3), "", partial(pixelcnn.draw, model, shape=SHAPE[:2]), bits)


def a_flow(features: int, steps: int) -> Model:
    """Its bits are those of dequantized pixels, by the keys."""
    model = flow.Flow(CLASSES, features, steps)
    bits = partial(flow.bits_per_dim, model)
    return Model(of_likelihood(model, bits, 1e-3), "", partial(flow.draw, model, shape=SHAPE), bits)


def a_vae(features: int) -> Model:
    """Its bits are a bound, by one draw from the posterior with each key."""
    model = vae.VAE(CLASSES, SHAPE, features=features)
    bits = partial(vae.bits_per_dim, model)
    return Model(of_likelihood(model, bits, 1e-3), "", partial(vae.draw, model), bits)


def of_likelihood(model: Any, loss: Callable, rate: float) -> Callable[[int], Stage]:
    """The stage of a model that is trained by its bits per dim."""

    def init_params(rng: jax.Array) -> Any:
        return model.init(rng, jnp.zeros((1, *SHAPE)), jnp.zeros((1,), jnp.int32))["params"]

    def stage(steps: int) -> Stage:
        optimizer = make_optimizer(
            steps=steps, learning_rate=rate, warmup_steps=min(100, steps // 4), decay="cosine", adam_b2=0.99,
            weight_decay=0.0, clip_norm=1.0,
        )  # fmt: skip
        return make_stage(init_params=init_params, loss=loss, optimizer=optimizer, ema_decay=0.99)

    return stage
