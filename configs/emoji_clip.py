"""The CLIP of `configs/emoji.py` alone (Radford 2021): a joint embedding of emoji and their names.

    python -m ldm_jax.train --config=configs/emoji_clip.py

Writes recall and zero-shot accuracy on held-out emoji to evaluation.json. A text-to-image run reuses it by
--config.clip.checkpoint=runs/emoji_clip.
"""

from ml_collections import ConfigDict

from configs import emoji


def get_config() -> ConfigDict:
    """The stage clip of configs/emoji.py."""
    config = emoji.get_config().unlock()
    config.stages = ("clip",)
    config.sampling.progress_every = 100  # steps between validations
    config.sampling.prompts = ()
    return config.lock()
