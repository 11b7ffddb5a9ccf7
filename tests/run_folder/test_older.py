"""Run folders from before some fields of the config: read with the defaults of those fields, not resumed."""

import json
import shutil

import jax
import jobs
import numpy as np
import pytest

from ldm_jax.config import io as config_io
from ldm_jax.pipeline.load import load

SINCE = ("init_from", "lora.rank", "lora.alpha", "sampling.prompts", "diffusion.snr_gamma", "classifier.steps")


def without(fields, names):
    for name in names:
        *sections, field = name.split(".")
        place = fields
        for section in sections:
            place = place[section]
        del place[field]
    return fields


@pytest.fixture
def older_run(trained_run, tmp_path):
    """A run folder whose config has not all the fields, and not one of its sections."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    fields = without(json.loads((run / "config.json").read_text()), SINCE)
    del fields["lora"]
    (run / "config.json").write_text(json.dumps(fields))
    return run


def test_an_older_run_is_read_with_the_defaults(older_run, trained_run, capsys):
    """Its own fields stay as they are, whatever their defaults."""
    older, params = load(older_run)
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert "as in ldm_jax/config/defaults.py are config.classifier.steps, config.diffusion.snr" in line
    assert line.endswith(", config.init_from, config.lora.*, config.sampling.prompts")
    newer, expected_params = load(trained_run)
    assert capsys.readouterr().out == ""
    config = older.origin.config
    was, expected = config_io.flatten(config), config_io.flatten(newer.origin.config)
    assert {name: was[name] for name in was if was[name] != expected[name]} == {"classifier.steps": 100_000}
    assert config.lora.alpha == 8.0 and config.unet.context_dim == 8
    assert older == newer
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)


def test_an_older_run_is_not_resumed(older_run, tiny_data, capsys):
    """Its checkpoints are of another config, whose hash they have."""
    before = (older_run / "config.json").read_text()
    assert jobs.train_here(tiny_data, older_run) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "was started by an older version, without config.classifier.steps" in line
    assert (older_run / "config.json").read_text() == before


SECTIONS = {name: {} for name in config_io.REQUIRED_SECTIONS}
NO_CONFIGS = [{"seed": 1}, SECTIONS | {"data": 3}, SECTIONS | {"lora": None}]


@pytest.mark.parametrize("fields", NO_CONFIGS)
def test_what_is_no_config_stays_as_it_is(fields):
    config = config_io.from_fields(fields)
    assert config_io.with_defaults(config, "there").to_dict() == config.to_dict()
