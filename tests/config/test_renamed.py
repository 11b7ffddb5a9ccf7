"""Config fields and flags under the names of earlier versions."""

import hashlib
import json

import pytest

from ldm_jax import command_line, train
from ldm_jax.config import defaults, io
from ldm_jax.config.added import is_as_before
from ldm_jax.config.renamed import FIELDS, FLAGS, rename_fields
from ldm_jax.sample import define_flags
from tests import jobs

VALUES = {
    "autoencoder.kind": "vq",
    "concat.kind": "inpainting",
    "data.kind_key": "label",
    "diffusion.bound_weight": 0.5,
    "diffusion.train_text": True,
    "evaluation.bound_examples": 3,
}


def renamed_values(config):
    fields = io.flatten(config)
    assert not FIELDS.keys() & fields.keys()
    return {old: fields[new] for old, new in FIELDS.items()}


def test_every_renamed_field_on_the_command_line(capsys):
    values = train.define_flags()
    argv = ["train", "--config=configs/base.py", *(f"--config.{old}={value}" for old, value in VALUES.items())]
    command_line.parse(values, argv, config=True)
    assert renamed_values(values.config) == VALUES
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [f"warning: --config.{old} is now called --config.{FIELDS[old]}" for old in VALUES]


def test_every_renamed_field_in_a_config_file(tmp_path, capsys):
    lines = [f"    config.{old} = {value!r}" for old, value in VALUES.items()]
    file = tmp_path / "mine.py"
    file.write_text(
        "from ldm_jax.config import defaults\n\n\ndef get_config():\n    config = defaults.get_config().unlock()\n"
        + "\n".join([*lines, "    return config", ""])
    )
    values = train.define_flags()
    command_line.parse(values, ["train", f"--config={file}"], config=True)
    assert renamed_values(values.config) == VALUES
    assert len(capsys.readouterr().err.splitlines()) == len(FIELDS)


def test_a_config_of_today_needs_no_warning(capsys):
    config = defaults.get_config()
    rename_fields(config)
    assert config == defaults.get_config()
    assert capsys.readouterr().err == ""


def test_a_saved_config_keeps_its_identity(tmp_path):
    """A run that an earlier version began goes on: its config.json and the hash in its checkpoints stay valid."""
    fields = json.loads(io.to_json(defaults.get_config()))
    for old, new in FIELDS.items():
        (section, name), (_, now) = old.split("."), new.split(".")
        fields[section][name] = VALUES[old]
        del fields[section][now]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = io.from_json(tmp_path / "config.json")
    assert renamed_values(config) == VALUES
    first = {
        f"{section}.{name}": value
        for section in ("autoencoder", "concat")
        for name, value in io.flatten(fields[section]).items()
        if not is_as_before(f"{section}.{name}", value)
    }
    expected = hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[:16]
    assert io.identity(config, ("autoencoder", "concat")) == expected
    assert io.differences(config, io.from_fields(fields)) == {}


@pytest.mark.parametrize(("old", "new"), FLAGS.items())
def test_every_renamed_flag(old, new, capsys):
    for form in (f"--{old}=3", f"-{old}=3"):
        values = define_flags()
        command_line.parse(values, ["sample", form])
        assert str(values[new].value) in ("3", "3.0")
        assert capsys.readouterr().err == f"warning: --{old} is now called --{new}\n"


def test_a_run_by_the_old_names(tiny_data, tmp_path, capsys):
    assert jobs.train_here(tiny_data, tmp_path / "run", "--config.autoencoder.kind=kl", "--dry_run=true") == 0
    assert "warning: --config.autoencoder.kind is now called --config.autoencoder.type" in capsys.readouterr().err
