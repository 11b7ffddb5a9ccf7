"""The CLIP of `configs/emoji.py` alone: emoji and what they are called in one space (Radford 2021).

    python -m ldm_jax.train --config=configs/emoji_clip.py

Leaves recall and zero-shot accuracy on emoji that it has not seen in evaluation.json. A diffusion model is told of
texts by it with --config.clip.checkpoint=runs/emoji_clip.
"""

from ml_collections import ConfigDict

from configs import emoji


def get_config() -> ConfigDict:
    """The stage alone."""
    config = emoji.get_config().unlock()
    config.stages = ("clip",)
    config.sampling.progress_every = 100  # validation; nothing is drawn
    config.sampling.prompts = ()
    return config.lock()
