"""The configs in configs/ are valid on any usual number of devices."""

import importlib
from pathlib import Path

import pytest

from ldm_jax import job
from ldm_jax.config import io as config_io
from ldm_jax.config import rules as config_rules
from ldm_jax.data import from_images
from ldm_jax.data.from_images import TrainingImages
from ldm_jax.pipeline.from_run import on_paper

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_valid(name, capsys):
    config = importlib.import_module(f"configs.{name}").get_config()
    if config_io.open_fields(config):
        config = config.copy_and_resolve_references().unlock()
        config.update_from_flattened_dict(from_images.fill(config, TrainingImages(180, 20, 10, 128, False)))
        config.update_from_flattened_dict(dict.fromkeys(config_io.open_fields(config), "train"))
        config.lock()
    config_rules.validate(config)
    for devices in (1, 2, 4, 8, 16):  # the batches of 16 of the smallest end there
        config_rules.validate_devices(config, devices)
    if config.init_from:  # its networks are in a folder that is not here
        return
    model, shapes = on_paper(config, tuple("0123456789"))
    job.print_sizes(config, model, shapes, num_classes=10)
    last = config.stages[-1]
    assert {"diffusion": "denoiser", "classifier": "classifier", "clip": "logit_scale"}[last] in capsys.readouterr().out
