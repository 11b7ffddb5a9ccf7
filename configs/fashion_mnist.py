"""Latent diffusion on Fashion-MNIST: the main job, for a CPU with two cores.

    python -m ldm_jax.train --config=configs/fashion_mnist.py

28x28 grayscale images -> 7x7x8 latents -> a UNet of 2.5 million parameters with cross-attention to 10 classes.
"""

from ml_collections import ConfigDict

from ldm_jax.config import defaults


def get_config() -> ConfigDict:
    """The config of `make train`."""
    config = defaults.get_config().unlock()

    autoencoder = config.autoencoder
    autoencoder.latent_channels = 8
    autoencoder.block_out_channels = (16, 32, 64)
    autoencoder.norm_num_groups = 8
    autoencoder.mid_block_attention = False
    autoencoder.loss.kl = 5e-3  # smoother latents are easier to model
    autoencoder.loss.perceptual = 1.0
    autoencoder.loss.perceptual_every = 4
    autoencoder.loss.perceptual_start = 2_000  # twice the time a step: when the images are nearly right
    autoencoder.loss.adversarial = 0.2
    autoencoder.loss.adversarial_start = 2_000
    autoencoder.discriminator.channels = 32
    autoencoder.discriminator.layers = 2  # three are too many for 28 pixels
    autoencoder.steps = 4_000
    autoencoder.batch_size = 16  # small: in a short training more steps are better than larger batches
    autoencoder.optimizer = "muon"
    autoencoder.learning_rate = 3e-3

    config.unet.block_out_channels = (64, 96)
    config.unet.attention = (False, True)
    config.unet.layers_per_block = 1
    config.unet.norm_num_groups = 16

    diffusion = config.diffusion
    diffusion.schedule = "cosine"  # linear is too noisy for small latents; with v, see experiments/tuning
    diffusion.prediction = "v"
    diffusion.weighting = "min_snr"
    diffusion.snr_gamma = 20.0  # more weight at low noise than with the usual 5: see experiments/tuning
    diffusion.steps = 5_800
    diffusion.batch_size = 64
    diffusion.optimizer = "muon"
    diffusion.learning_rate = 2e-3

    sampling = config.sampling
    sampling.sampler = "unipc"  # the best Fréchet distance in few steps: see experiments/solvers
    sampling.steps = 12
    sampling.guidance = 1.75
    sampling.guidance_interval = (0.1, 0.9)  # guidance at high noise reduces diversity: see experiments/tuning
    sampling.guide_step = 1_500  # more diverse than by the null condition of the last step: see experiments/tuning
    sampling.batch_size = 256
    sampling.progress_every = 1_000
    config.checkpoint_every = 500
    return config.lock()
