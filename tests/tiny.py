"""The smallest config that goes through every part of the job, and its data: 8x8 grey pictures of four kinds.

Also a config file: --config=tests/tiny.py.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import defaults

CLASS_NAMES = ("horizontal", "vertical", "bright", "dark")


def get_config() -> ConfigDict:
    config = defaults.get_config().unlock()
    config.data.name = "tiny"
    config.data.image_size = 8
    autoencoder = config.autoencoder
    autoencoder.latent_channels = 2
    autoencoder.block_out_channels = (8, 8)
    autoencoder.norm_num_groups = 4
    autoencoder.mid_block_attention = False
    autoencoder.codebook_size = 8
    autoencoder.loss.perceptual = 0.0
    autoencoder.loss.adversarial = 0.0
    autoencoder.discriminator.channels = 8
    autoencoder.discriminator.layers = 1
    for stage in (autoencoder, config.clip, config.diffusion, config.classifier):
        stage.steps = 8
        stage.batch_size = 8
        stage.warmup_steps = 2
        stage.learning_rate = 1e-3
    clip = config.clip
    clip.vocab_size = 520
    clip.max_length = 24
    clip.text_width = clip.image_width = clip.projection_dim = 8
    clip.text_layers = clip.image_layers = 1
    clip.text_heads = clip.image_heads = 2
    clip.patch_size = 4
    clip.validation_examples = 16
    config.diffusion.timesteps = 20
    config.diffusion.validation_examples = 16
    config.unet.block_out_channels = (8,)
    config.unet.attention = (True,)
    config.unet.layers_per_block = 1
    config.unet.attention_heads = 2
    config.unet.norm_num_groups = 4
    config.unet.context_dim = 8
    config.classifier.block_out_channels = (8,)
    config.classifier.attention = (True,)
    config.classifier.attention_heads = 2
    config.classifier.norm_num_groups = 4
    config.sampling.num = 8
    config.sampling.steps = 4
    config.sampling.batch_size = 8
    config.sampling.progress_every = 4
    config.evaluation.num_reference = 16
    config.evaluation.vlb_examples = 0
    config.evaluation.resize = 16
    config.evaluation.batch_size = 8
    config.log_every = 2
    config.checkpoint_every = 4
    return config.lock()


def pictures(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 8, 8, 1] and labels [n] in 0..3."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    ramp = np.linspace(0, 200, 8)
    plain = {
        0: np.tile(ramp, (8, 1)),
        1: np.tile(ramp[:, None], (1, 8)),
        2: np.full((8, 8), 220),
        3: np.full((8, 8), 30),
    }
    images = np.stack([plain[k] for k in labels])[..., None] + rng.integers(0, 30, (n, 8, 8, 1))
    return images.clip(0, 255).astype(np.uint8), labels.astype(np.int64)


def areas(image: np.ndarray) -> np.ndarray:
    """A map of the classes 0, 1 and 2, uint8 like the picture: dark, middling and bright."""
    return (image // 86).astype(np.uint8)


def prepare(
    data_dir: Path, *, train: int = 64, test: int = 16, seed: int = 0, shift: int = 0, class_names=CLASS_NAMES
) -> None:
    """Prepares the data set "tiny" as TFDS ArrayRecord below `data_dir`; `shift` is of the labels."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=class_names),
                    "areas": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(train, seed), "test": self._generate_examples(test, seed + 1)}

        def _generate_examples(self, n, seed):
            for i, (image, label) in enumerate(zip(*pictures(n, seed))):
                said = [CLASS_NAMES[label], f"a {CLASS_NAMES[label]} picture"]
                label = (label + shift) % len(class_names)
                yield i, {"image": image, "label": label, "areas": areas(image), "captions": said}

    Tiny.name = "tiny"
    builder = Tiny(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
