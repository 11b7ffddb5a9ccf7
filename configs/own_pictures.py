"""Latent diffusion on a folder of your own images, grey or in colour, at up to 64x64 pixels, for a CPU with two cores.

    python -m ldm_jax.train --config=configs/own_pictures.py --config.data.path=FOLDER

FOLDER has images, or a folder of images for each class, or so in folders "train" and "test": see
`ldm_jax/data/own_images.py`. The run is class-conditional if there are classes. 64x64 RGB images -> 16x16x4 latents ->
a UNet of 4 million parameters.

Fields that are None follow from the training images by the rules of `ldm_jax/data/from_images.py`: resolution,
channels, steps, number of samples. The first lines say their values, then how long training takes. A value on the
command line replaces a rule's: --config.data.image_size=32 is faster, --config.diffusion.steps=10000 better.
--config.data.flip=True doubles images that have no left and right, --config.data.crop=none keeps the edges.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ldm_jax.config import defaults


def get_config() -> ConfigDict:
    """The config of one's own images; `data.path` is to be set."""
    config = defaults.get_config().unlock()

    data = config.data
    data.name = "images"
    data.image_size = placeholder(int)
    data.channels = placeholder(int)

    autoencoder = config.autoencoder
    autoencoder.latent_channels = placeholder(int)
    autoencoder.block_out_channels = (16, 32, 64)
    autoencoder.norm_num_groups = 8
    autoencoder.mid_block_attention = False
    autoencoder.loss.perceptual_every = 4
    autoencoder.loss.perceptual_start = placeholder(int)
    autoencoder.loss.adversarial = 0.2
    autoencoder.loss.adversarial_start = placeholder(int)
    autoencoder.discriminator.channels = 32
    autoencoder.discriminator.layers = 2
    autoencoder.steps = placeholder(int)
    autoencoder.batch_size = 16
    autoencoder.optimizer = "muon"
    autoencoder.learning_rate = 3e-3

    config.unet.block_out_channels = (64, 128)
    config.unet.attention = (False, True)
    config.unet.layers_per_block = 1
    config.unet.norm_num_groups = 16

    diffusion = config.diffusion
    diffusion.schedule = "cosine"
    diffusion.prediction = "v"
    diffusion.weighting = "min_snr"
    diffusion.steps = placeholder(int)
    diffusion.batch_size = 32
    diffusion.optimizer = "muon"
    diffusion.learning_rate = 2e-3
    diffusion.validation_examples = 256

    sampling = config.sampling
    sampling.num = placeholder(int)
    sampling.sampler = "unipc"
    sampling.steps = 16
    sampling.guidance = 2.0
    sampling.batch_size = 64
    sampling.progress_every = 1_000
    evaluation = config.evaluation
    evaluation.resize = placeholder(int)
    evaluation.batch_size = 32
    evaluation.vlb_examples = 64
    config.checkpoint_every = 500
    return config.lock()
