"""Text-to-image from scratch, for quality: emoji of 64 pixels, for one GPU. It has not been run yet.

python -m ldm_jax.train --config=configs/emoji_best.py
"""

from ml_collections import ConfigDict

from configs import emoji


def get_config() -> ConfigDict:
    """Wider networks, the perceptual loss from the first step, bfloat16 and more steps than configs/emoji.py."""
    config = emoji.get_config().unlock()
    config.dtype = "bfloat16"
    config.data.image_size = 64

    autoencoder = config.autoencoder
    autoencoder.block_out_channels = (64, 128, 128)
    autoencoder.layers_per_block = 2
    autoencoder.norm_num_groups = 32
    autoencoder.mid_block_attention = True
    autoencoder.loss.perceptual_every = 1
    autoencoder.loss.perceptual_start = 0
    autoencoder.loss.adversarial_start = 8_000
    autoencoder.discriminator.channels = 64
    autoencoder.steps = 30_000
    autoencoder.batch_size = 64
    autoencoder.learning_rate = 2e-3

    clip = config.clip
    clip.text_width = clip.image_width = 256
    clip.text_layers = clip.image_layers = 4
    clip.patch_size = 8
    clip.batch_size = 512
    clip.steps = 3_000

    config.unet.block_out_channels = (128, 256, 256)
    config.unet.attention = (True, True, True)
    config.unet.layers_per_block = 2
    config.unet.norm_num_groups = 32
    config.unet.context_dim = 256

    diffusion = config.diffusion
    diffusion.steps = 60_000
    diffusion.batch_size = 512
    diffusion.ema_decay = 0.9995

    config.sampling.steps = 25
    config.sampling.progress_every = 5_000
    config.checkpoint_every = 5_000
    return config.lock()
