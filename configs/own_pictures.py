"""Latent diffusion on a folder of your own images, in colour at 64x64 pixels, for a CPU with two cores.

    python -m ldm_jax.train --config=configs/own_pictures.py --config.data.path=FOLDER

FOLDER has images, or a folder of images for each class, or so in folders "train" and "test": see
`ldm_jax/data/own_images.py`. The run is class-conditional if there are classes. 64x64 RGB images -> 16x16x4 latents ->
a UNet of 4 million parameters. Progress lines give the time that is left.

The steps are for some hundred images; for thousands increase them: --config.autoencoder.steps=10000
--config.diffusion.steps=20000. --config.data.image_size=32 is faster, --config.data.flip=True doubles
images that have no left and right, --config.data.crop=none keeps the edges.
"""

from ml_collections import ConfigDict

from ldm_jax.config import defaults


def get_config() -> ConfigDict:
    """The config of one's own images; `data.path` is to be set."""
    config = defaults.get_config().unlock()

    data = config.data
    data.name = "images"
    data.image_size = 64
    data.channels = 3

    autoencoder = config.autoencoder
    autoencoder.latent_channels = 4
    autoencoder.block_out_channels = (16, 32, 64)
    autoencoder.norm_num_groups = 8
    autoencoder.mid_block_attention = False
    autoencoder.loss.perceptual = 0.0
    autoencoder.loss.adversarial = 0.2
    autoencoder.loss.adversarial_start = 1_000
    autoencoder.discriminator.channels = 32
    autoencoder.discriminator.layers = 2
    autoencoder.steps = 2_000
    autoencoder.batch_size = 16
    autoencoder.learning_rate = 1.5e-3

    config.unet.block_out_channels = (64, 128)
    config.unet.attention = (False, True)
    config.unet.layers_per_block = 1
    config.unet.norm_num_groups = 16

    diffusion = config.diffusion
    diffusion.schedule = "cosine"
    diffusion.prediction = "v"
    diffusion.weighting = "min_snr"
    diffusion.steps = 4_000
    diffusion.batch_size = 32
    diffusion.learning_rate = 1e-3
    diffusion.validation_examples = 256

    sampling = config.sampling
    sampling.num = 100
    sampling.sampler = "unipc"
    sampling.steps = 16
    sampling.guidance = 2.0
    sampling.batch_size = 64
    sampling.progress_every = 1_000
    evaluation = config.evaluation
    evaluation.resize = 64
    evaluation.batch_size = 32
    evaluation.vlb_examples = 64
    config.checkpoint_every = 500
    return config.lock()
