"""The baseline models by name, in sizes with about as many parameters as latent diffusion."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from flax import linen as nn

from experiments.baselines import flow, gan, pixelcnn, vae
from experiments.baselines.gan import GANStage
from experiments.baselines.stage import LikelihoodStage
from ldm_jax.training.optimizer import Optimization

SHAPE, CLASSES = (28, 28, 1), 10
GAN, SPECTRAL = "GAN", "GAN, hinge, spectral norm"


class Model(NamedTuple):
    """A baseline model: its training stage, sampling function and likelihood."""

    stage: Callable[[int], GANStage | LikelihoodStage]  # number of steps -> stage
    part: str  # the subtree of the EMA parameters that samples; "": all
    sample: Callable[..., jax.Array]  # (params, labels, keys) -> images
    bits: Callable[..., jax.Array] | None  # (params, images, labels, keys) -> bits per dim [B]; None: no likelihood


class Sizes(NamedTuple):
    """Widths and depths of the baselines; the defaults have 1.7 million parameters each."""

    pixelcnn: tuple[int, int] = (76, 12)  # features, layers
    flow: tuple[int, int] = (208, 8)  # features, steps per level
    gan: int = 64
    vae: int = 52


HALF_A_MILLION = Sizes((42, 12), (112, 8), 32, 22)
SMALL = Sizes((16, 2), (16, 1), 16, 16)  # for tests


def models(sizes: Sizes) -> dict[str, Model]:
    """Name -> baseline."""
    return gans(sizes.gan) | {
        "PixelCNN": pixelcnn_model(*sizes.pixelcnn),
        "flow": flow_model(*sizes.flow),
        "VAE": vae_model(sizes.vae),
    }


def gans(features: int) -> dict[str, Model]:
    """Two GANs of one architecture, with the most common losses and regularizers."""
    generator, adam = gan.Generator(CLASSES, SHAPE, features=features), gan.Adam(1e-3, b1=0.0, b2=0.99)

    def model(loss: str, r1: float, spectral_norm: bool) -> Model:
        discriminator = gan.Discriminator(CLASSES, features=features, spectral_norm=spectral_norm)
        stage = GANStage(generator, discriminator, loss, r1, adam, ema_decay=0.99)
        return Model(lambda steps: stage, "generator", partial(gan.sample, generator), None)

    return {
        GAN: model("non_saturating", r1=1.0, spectral_norm=False),
        SPECTRAL: model("hinge", r1=0.0, spectral_norm=True),
    }


def pixelcnn_model(features: int, layers: int) -> Model:
    """A gated PixelCNN: exact bits per dim, without keys."""
    model = pixelcnn.PixelCNN(CLASSES, features, layers)
    return likelihood_model(model, pixelcnn.bits_per_dim, partial(pixelcnn.sample, model, shape=SHAPE[:2]), 2e-3)


def flow_model(features: int, steps: int) -> Model:
    """A flow: bits per dim of pixels dequantized with the keys."""
    model = flow.Flow(CLASSES, features, steps)
    return likelihood_model(model, flow.bits_per_dim, partial(flow.sample, model, shape=SHAPE), 1e-3)


def vae_model(features: int) -> Model:
    """A VAE: bits per dim are the VLB, from one sample of the posterior per key."""
    model = vae.VAE(CLASSES, SHAPE, features=features)
    return likelihood_model(model, vae.bits_per_dim, partial(vae.sample, model), 1e-3)


def likelihood_model(
    model: nn.Module, bits_per_dim: Callable[..., jax.Array], sample: Callable[..., jax.Array], learning_rate: float
) -> Model:
    """A baseline trained by maximum likelihood: see `LikelihoodStage`."""

    def stage(steps: int) -> LikelihoodStage:
        optimization = Optimization(
            steps=steps, learning_rate=learning_rate, warmup_steps=min(100, steps // 4), decay="cosine", adam_b2=0.99,
            weight_decay=0.0, clip_norm=1.0,
        )  # fmt: skip
        return LikelihoodStage(model, bits_per_dim, SHAPE, optimization, ema_decay=0.99)

    return Model(stage, "", sample, partial(bits_per_dim, model))
