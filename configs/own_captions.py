"""Text-to-image on a folder of your own images with captions, at up to 64x64 pixels, for a CPU with two cores.

    python -m ldm_jax.train --config=configs/own_captions.py --config.data.path=FOLDER
    python -m ldm_jax.sample --model=runs/own_captions --prompt="a caption" --out=samples

FOLDER has images with a .txt file each, or a metadata.jsonl or metadata.csv: see `ldm_jax/data/caption_files.py`. Its
folders "train" and "test" (or "validation") are the splits; without them a tenth of the images is held out. Fields that
are None follow from the training images: see `own_pictures`. Autoencoder, CLIP and UNet are those of `own_pictures` and
of `emoji`, for some hundred or thousand similar images; photographs of everything need a pretrained model:
`configs/finetune.py`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import own_pictures


def get_config() -> ConfigDict:
    """The config of one's own images with captions; `data.path` is to be set."""
    config = own_pictures.get_config().unlock()
    config.stages = ("autoencoder", "clip", "diffusion")

    data = config.data
    data.name = "folder"
    data.caption_key = "auto"
    data.train_split = placeholder(str)
    data.test_split = placeholder(str)

    clip = config.clip
    clip.text_width = 128
    clip.image_width = 96
    clip.patch_size = placeholder(int)
    clip.max_length = 48
    clip.max_shift = 4
    clip.max_zoom = 0.1
    clip.steps = placeholder(int)
    clip.batch_size = 64
    clip.validation_examples = 256
    config.unet.context_dim = 128
    config.sampling.guidance = 3.0
    return config.lock()
