"""Latent diffusion on Fashion-MNIST, for quality: for one GPU.

    python -m ldm_jax.train --config=configs/fashion_mnist_best.py

The main job with wider networks, LPIPS from the first step, bfloat16 and more steps. It has not been run yet.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """The main job, changed for quality."""
    config = fashion_mnist.get_config().unlock()
    config.dtype = "bfloat16"

    autoencoder = config.autoencoder
    autoencoder.block_out_channels = (64, 128, 128)
    autoencoder.layers_per_block = 2
    autoencoder.norm_num_groups = 32
    autoencoder.mid_block_attention = True
    autoencoder.loss.perceptual_every = 1
    autoencoder.loss.perceptual_start = 0
    autoencoder.loss.adversarial_start = 8_000
    autoencoder.discriminator.channels = 64
    autoencoder.steps = 20_000
    autoencoder.batch_size = 256
    autoencoder.learning_rate = 2e-3

    config.unet.block_out_channels = (128, 256)
    config.unet.attention = (True, True)
    config.unet.layers_per_block = 3
    config.unet.norm_num_groups = 32

    diffusion = config.diffusion
    diffusion.steps = 60_000
    diffusion.batch_size = 512
    diffusion.learning_rate = 2e-3
    diffusion.ema_decay = 0.9995

    config.sampling.steps = 25
    config.sampling.guidance = 1.75
    config.sampling.guide_step = 0
    config.sampling.batch_size = 1_024
    config.sampling.progress_every = 5_000
    config.evaluation.batch_size = 512
    config.checkpoint_every = 5_000
    return config.lock()
