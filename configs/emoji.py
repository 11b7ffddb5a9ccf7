"""Text-to-image from scratch: emoji and their names. Autoencoder, CLIP and UNet, for a CPU with two cores.

    make emoji                                           or, with the fonts downloaded by `make emoji-data`:
    python -m ldm_jax.train --config=configs/emoji.py
    python -m ldm_jax.sample --model=runs/emoji --prompt="red cat" --out=samples

32x32 RGB images -> 8x8x8 latents -> a UNet of 4 million parameters with cross-attention to the text encoder of a CLIP
trained on the same images. A tenth of the emoji, with all their variants, is held out. After about an hour the model
follows prompts of soccer balls, apples, hearts, flags, faces and people.
"""

from ml_collections import ConfigDict

from ldm_jax.config import defaults


def get_config() -> ConfigDict:
    """The config of `make emoji`."""
    config = defaults.get_config().unlock()
    config.stages = ("autoencoder", "clip", "diffusion")

    data = config.data
    data.name = "emoji"
    data.test_split = "validation"
    data.caption_key = "auto"
    data.group_key = "toneless"  # balanced sampling: people in five skin tones are half of the images
    data.image_size = 32
    data.channels = 3

    autoencoder = config.autoencoder
    autoencoder.latent_channels = 8
    autoencoder.block_out_channels = (16, 32, 64)
    autoencoder.norm_num_groups = 8
    autoencoder.mid_block_attention = False
    autoencoder.loss.kl = 5e-3
    autoencoder.loss.perceptual = 1.0
    autoencoder.loss.perceptual_every = 4
    autoencoder.loss.perceptual_start = 2_000
    autoencoder.loss.adversarial = 0.2
    autoencoder.loss.adversarial_start = 2_000
    autoencoder.discriminator.channels = 32
    autoencoder.discriminator.layers = 2
    autoencoder.steps = 4_000
    autoencoder.batch_size = 16
    autoencoder.optimizer = "muon"
    autoencoder.learning_rate = 3e-3

    clip = config.clip
    clip.text_width = 128
    clip.image_width = 96
    clip.max_shift = 4
    clip.max_zoom = 0.25
    clip.steps = 900
    clip.optimizer = "muon"
    clip.learning_rate = 2e-3
    clip.weight_decay = 0.5
    clip.validation_examples = 384

    config.unet.block_out_channels = (64, 128)
    config.unet.attention = (False, True)
    config.unet.layers_per_block = 1
    config.unet.norm_num_groups = 16
    config.unet.context_dim = 128

    diffusion = config.diffusion
    diffusion.schedule = "cosine"
    diffusion.prediction = "v"
    diffusion.weighting = "min_snr"
    diffusion.snr_gamma = 20.0
    diffusion.steps = 7_000
    diffusion.batch_size = 64
    diffusion.optimizer = "muon"
    diffusion.learning_rate = 2e-3
    diffusion.validation_examples = 384

    sampling = config.sampling
    sampling.prompts = (
        "red cat",
        "sleepy pizza",
        "penguin with sunglasses",
        "green heart with arrow",
        "blue apple",
        "purple car",
        "cat on fire",
        "frog face with tears of joy",
    )
    sampling.num = 400
    sampling.sampler = "unipc"
    sampling.steps = 16
    sampling.guidance = 3.0
    sampling.batch_size = 192
    sampling.progress_every = 2_000
    config.evaluation.zero_shot_key = "group"
    config.checkpoint_every = 1_000
    return config.lock()
