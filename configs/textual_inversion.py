"""Textual inversion (Gal 2022) of a few images: a new token of a text-to-image model, for one GPU.

    python -m ldm_jax.train --config=configs/textual_inversion.py [--config.init_from=MODEL] --config.data.path=DIR \
                            --config.textual_inversion.token="<my-thing>" [--config.textual_inversion.init_word=toy]

MODEL is Stable Diffusion 1, 2 or XL as a diffusers folder, a single file or a hub id, by default Stable Diffusion 1.5.
DIR has images of one object or, with `--config.textual_inversion.learnable_property=style`, of one style; three to
five are enough. They are trained with prompts such as "a photo of a <my-thing>", an image with a caption (see
`configs/finetune.py`) with that, which must contain the token. Only the token's vectors are trained, one or
`--config.textual_inversion.vectors` in each text encoder; the rest of the model stays as it is. They are written to
`learned_embeds.safetensors`, which diffusers' `load_textual_inversion` reads. Then:

    python -m ldm_jax.sample --model=runs/textual_inversion --prompt="a <my-thing> on the beach" --out=samples
    python -m ldm_jax.sample --model=MODEL --embedding=runs/textual_inversion/learned_embeds.safetensors --prompt=...
"""

from ml_collections import ConfigDict

from configs import finetune


def get_config() -> ConfigDict:
    """The token's vectors at a high learning rate; as in the paper, without weight decay or averaging."""
    config = finetune.get_config().unlock()
    config.textual_inversion.token = "<concept>"
    config.data.name = "concept"
    config.data.flip = True

    diffusion = config.diffusion
    diffusion.steps = 1_000
    diffusion.learning_rate = 2e-3
    diffusion.warmup_steps = 0
    diffusion.weight_decay = 0.0
    diffusion.label_dropout = 0.0
    diffusion.ema_decay = 0.0

    config.sampling.progress_every = 250
    config.checkpoint_every = 250
    return config.lock()
