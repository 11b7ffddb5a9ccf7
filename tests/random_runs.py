"""Run folders of any kind, made in a moment: with random parameters instead of training."""

import diffusers_folder
import jax
import numpy as np
import tiny

from ldm_jax.config import rules as config_rules
from ldm_jax.export.diffusers_folder import write_run
from ldm_jax.interop.modules import abstract_params
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline.from_exported import Exported
from ldm_jax.training import from_config as training_from_config


def random_run(folder, changes=(), class_names=tiny.CLASS_NAMES, contrast=1.0):
    """A run of tests/tiny.py with `changes`, dotted fields; `contrast` is of what the last layer draws."""
    config = tiny.get_config().unlock()
    config.update_from_flattened_dict(dict(changes))
    config.lock()
    config_rules.validate(config)
    stage = training_from_config.build_diffusion_stage(config, len(class_names))
    params = diffusers_folder.random_params(jax.eval_shape(stage.init, jax.random.key(0)).ema_params, 0)
    if config.autoencoder.kind == "none":
        params["unet"]["conv_out"] = jax.tree.map(lambda leaf: contrast * leaf, params["unet"]["conv_out"])
    channels, autoencoder = (
        pipeline_from_config.latent_shape(config)[-1],
        pipeline_from_config.build_autoencoder(config),
    )
    scaling = {"shift": np.zeros(channels, np.float32), "scale": np.ones(channels, np.float32)}
    params["autoencoder"] = {}
    if autoencoder:
        params["autoencoder"] = diffusers_folder.random_params(abstract_params(autoencoder), 1)
        decoder = params["autoencoder"]["decoder"]
        decoder["conv_out"] = jax.tree.map(lambda leaf: contrast * leaf, decoder["conv_out"])
        shift, scale = np.random.default_rng(2).uniform(0.5, 1.5, (2, channels)).astype(np.float32)
        scaling = {"shift": shift, "scale": scale}
    data = {"class_names": list(class_names), "train": 64, "test": 16}
    steps = {"step": 8, "autoencoder_step": 8 if autoencoder else 0, "measured_on": "tiny/train" if autoencoder else ""}
    folder.mkdir()
    write_run(folder, Exported(config, data, params | scaling, **steps))
    return folder
