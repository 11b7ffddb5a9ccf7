"""Models and run folders of any kind, made in a moment: with random parameters instead of training."""

import diffusers_folder
import jax
import numpy as np
import tiny

from ldm_jax.config import rules as config_rules
from ldm_jax.export.run_folder import write_run
from ldm_jax.interop.modules import abstract_params
from ldm_jax.pipeline.from_config import identity_scale
from ldm_jax.pipeline.from_exported import Record
from ldm_jax.pipeline.from_run import on_paper


def random_config(changes=()):
    """tests/tiny.py with `changes`, dotted fields."""
    config = tiny.get_config().unlock()
    config.update_from_flattened_dict(dict(changes))
    config_rules.validate(config.lock())
    return config


def random_model(changes=(), class_names=tiny.CLASS_NAMES, contrast=1.0):
    """A model of tests/tiny.py with `changes`, and its parameters; `contrast` is of what the last layer samples."""
    model, shapes = on_paper(random_config(changes), class_names)
    params = diffusers_folder.random_params(shapes, 0) | {"first_stage": {}}
    channels, autoencoder, last = model.latent_shape[-1], model.first_stage.module, params["denoiser"]
    scaling = identity_scale(channels)
    if autoencoder:
        params["first_stage"] = diffusers_folder.random_params(abstract_params(autoencoder), 1)
        last = params["first_stage"]["decoder"]
        shift, scale = np.random.default_rng(2).uniform(0.5, 1.5, (2, channels)).astype(np.float32)
        scaling = {"shift": shift, "scale": scale}
    last["conv_out"] = jax.tree.map(lambda leaf: contrast * leaf, last["conv_out"])
    return model, params | scaling


def random_run(folder, changes=(), class_names=tiny.CLASS_NAMES, contrast=1.0):
    """The run folder of such a model, with the checkpoint of `sampling.guide_step` if there is one; returns it."""
    model, params = random_model(changes, class_names, contrast)
    data = {"class_names": list(class_names), "train": 64, "test": 16}
    latents = model.first_stage.module is not None
    steps = {"step": 8, "autoencoder_step": 8 if latents else 0, "measured_on": "tiny/train" if latents else ""}
    folder.mkdir()
    earlier = None
    if model.defaults.guide_step:
        earlier = params | {"denoiser": jax.tree.map(lambda leaf: leaf[..., ::-1], params["denoiser"])}
    write_run(model, params, folder, Record(model.origin.config, data, **steps), earlier)
    return folder
