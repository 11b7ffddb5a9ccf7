"""Run folders from before some fields of the config: those added since version 0.2 make no difference.

Of versions before they are read with the defaults, but not resumed.
"""

import json
import shutil

import jax
import jobs
import numpy as np
import pytest

from ldm_jax.config import io as config_io
from ldm_jax.config.added import ADDED, REQUIRED_SECTIONS
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
    assert "was started by a version before 0.2, without config.classifier.steps" in line
    assert (older_run / "config.json").read_text() == before


SECTIONS = {name: {"own": name} for name in REQUIRED_SECTIONS}


@pytest.mark.parametrize("fields", [{"seed": 1}, SECTIONS | {"data": 3}])
def test_what_is_no_config_stays_as_it_is(fields):
    config = config_io.from_fields(fields)
    assert config.to_dict() == fields
    assert config_io.with_defaults(config, "there").to_dict() == fields


@pytest.mark.parametrize("section", ["lora", "textual_inversion"])
def test_a_section_that_is_none_stays_none(section):
    """The only new fields are the added ones of the other sections."""
    config = config_io.from_fields(SECTIONS | {section: None})
    missing = ("clip.", "classifier.", "autoencoder.loss.", f"{section}.")
    added = {name: value for name, value in ADDED.items() if not name.startswith(missing)}
    own = {f"{name}.own": name for name in REQUIRED_SECTIONS}
    assert config_io.flatten(config) == own | {section: None} | added
    assert config_io.with_defaults(config, "there").to_dict() == config.to_dict()


@pytest.fixture
def run_of_0_2(trained_run, tmp_path):
    """The run folder of a version without the fields added since, half trained."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    fields = without(json.loads((run / "config.json").read_text()), ADDED)
    for section in {name.split(".")[0] for name in ADDED} & {name for name, field in fields.items() if field == {}}:
        del fields[section]
    (run / "config.json").write_text(json.dumps(fields))
    shutil.rmtree(run / "diffusion" / "8")
    (run / "evaluation.json").unlink()
    return run


@pytest.mark.slow
def test_a_run_without_the_added_fields_is_resumed_exactly(run_of_0_2, trained_run, tiny_data, capsys):
    """Its checkpoints and cached latents are its own still; at the end it is a run of today."""
    made = {path.name: path.stat().st_mtime_ns for path in (run_of_0_2 / "latents").iterdir()}
    assert jobs.train_here(tiny_data, run_of_0_2) == 0
    jobs.assert_same_training(run_of_0_2, trained_run)
    assert jobs.losses(run_of_0_2) == jobs.losses(trained_run)
    assert {path.name: path.stat().st_mtime_ns for path in (run_of_0_2 / "latents").iterdir()} == made
    assert "older version" not in capsys.readouterr().out
    now, whole = (config_io.from_json(run / "config.json") for run in (run_of_0_2, trained_run))
    assert config_io.flatten(now) == config_io.flatten(whole) | {"data.dir": str(tiny_data)}


def test_a_finished_run_without_the_added_fields_is_done(run_of_0_2, trained_run, tiny_data, capsys):
    for name in ("evaluation.json", "diffusion/8"):
        (shutil.copytree if name.endswith("8") else shutil.copy)(trained_run / name, run_of_0_2 / name)
    assert jobs.train_here(tiny_data, run_of_0_2) == 0
    assert "All is done" in capsys.readouterr().out


def test_a_run_without_an_added_field_is_not_resumed_with_another_value(run_of_0_2, tiny_data, capsys):
    before = (run_of_0_2 / "config.json").read_text()
    assert jobs.train_here(tiny_data, run_of_0_2, "--config.textual_inversion.vectors=2") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "belongs to another config (textual_inversion.vectors: 1 -> 2)" in line
    assert (run_of_0_2 / "config.json").read_text() == before
