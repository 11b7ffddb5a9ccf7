"""Run folders of any kind, made in a moment: with random parameters instead of training."""

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


def random_run(folder, changes=(), class_names=tiny.CLASS_NAMES, contrast=1.0):
    """A run of tests/tiny.py with `changes`, dotted fields; `contrast` is of what the last layer samples."""
    config = tiny.get_config().unlock()
    config.update_from_flattened_dict(dict(changes))
    config.lock()
    config_rules.validate(config)
    model, shapes = on_paper(config, class_names)
    params = diffusers_folder.random_params(shapes, 0) | {"first_stage": {}}
    channels, autoencoder, last = model.latent_shape[-1], model.first_stage.module, params["denoiser"]
    scaling = identity_scale(channels)
    if autoencoder:
        params["first_stage"] = diffusers_folder.random_params(abstract_params(autoencoder), 1)
        last = params["first_stage"]["decoder"]
        shift, scale = np.random.default_rng(2).uniform(0.5, 1.5, (2, channels)).astype(np.float32)
        scaling = {"shift": shift, "scale": scale}
    last["conv_out"] = jax.tree.map(lambda leaf: contrast * leaf, last["conv_out"])
    data = {"class_names": list(class_names), "train": 64, "test": 16}
    steps = {"step": 8, "autoencoder_step": 8 if autoencoder else 0, "measured_on": "tiny/train" if autoencoder else ""}
    folder.mkdir()
    write_run(model, params | scaling, folder, Record(config, data, **steps))
    return folder
