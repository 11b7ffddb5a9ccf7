"""Fields added since version 0.2: a config without them has the same meaning, and the same hashes, as ever."""

import json
from pathlib import Path

import pytest

from ldm_jax.config import added, defaults, io
from ldm_jax.config.added import ADDED
from ldm_jax.run_folder.checkpoint import identity

# The default config of version 0.2, and the hashes of its fields that its checkpoints and scores have.
SAVED = json.loads((Path(__file__).parent / "version_0_2.json").read_text())
STAGES = {
    "autoencoder": "d8e219c73c365533",
    "clip": "7c1f1d534535dc90",
    "diffusion": "3eed96735c6ff401",
    "classifier": "831e60d815e67af2",
}
SCORES = "57672052f99a48c4"


def saved(**changes):
    return io.from_fields(json.loads(json.dumps(SAVED)) | changes)


def hashes(config):
    return {stage: identity(config, stage)["config"] for stage in STAGES} | {
        "scores": io.identity(config, ("sampling", "evaluation"))
    }


def test_every_field_is_one_of_version_0_2_or_added():
    """Who adds a field to `defaults` states in `added` what configs without it mean; no field is in both."""
    fields = io.flatten(SAVED)
    assert io.flatten(defaults.get_config()).keys() - fields.keys() == ADDED.keys()


def test_the_hashes_of_version_0_2_are_those_of_today():
    assert hashes(saved()) == STAGES | {"scores": SCORES}
    config = defaults.get_config().unlock()
    config.update_from_flattened_dict(ADDED)
    config.update_from_flattened_dict({name: io.flatten(saved())[name] for name in io.flatten(SAVED)})
    assert hashes(config) == STAGES | {"scores": SCORES}


def test_a_saved_config_without_the_fields_has_their_values():
    fields = io.flatten(saved())
    assert {name: fields[name] for name in ADDED} == ADDED
    assert (
        io.flatten(saved(textual_inversion={"vectors": 3})).items()
        >= {
            "textual_inversion.vectors": 3,
            "textual_inversion.token": "",
        }.items()
    )
    assert io.differences(saved(), io.from_fields(json.loads(io.to_json(saved())))) == {}


@pytest.mark.parametrize("name", ADDED)
def test_another_value_is_another_config(name):
    changed = saved().unlock()
    values = {str: "x", int: 7, float: 0.7, bool: True, tuple: (0.05, 0.1)}
    changed.update_from_flattened_dict({name: values[type(ADDED[name])]})
    assert list(io.differences(saved(), changed)) == ([] if name.startswith(io.FREE) else [name])
    sections = (name.split(".")[0],)
    assert io.identity(changed, sections) != io.identity(saved(), sections)


def test_the_engine_changes_no_hash():
    """A run goes on with another engine, and its checkpoints and scores stay valid."""
    changed = saved(parallel={"engine": "fsdp", "fsdp": 2, "accumulate": 4, "remat": True})
    assert hashes(changed) == STAGES | {"scores": SCORES}
    assert io.differences(saved(), changed) == {}


def test_a_new_default_changes_no_saved_config(monkeypatch):
    """As if a later version had another default: a config without the field still means the first."""
    get_config = defaults.get_config

    def later():
        config = get_config().unlock()
        config.textual_inversion.vectors = 4
        return config.lock()

    monkeypatch.setattr(defaults, "get_config", later)
    assert io.with_defaults(saved(), "there").textual_inversion.vectors == 1
    assert hashes(saved())["diffusion"] == STAGES["diffusion"]
    assert hashes(defaults.get_config())["diffusion"] != STAGES["diffusion"]
    changed = saved(textual_inversion={"vectors": 4})
    assert list(io.differences(saved(), changed)) == ["textual_inversion.vectors"]


def test_what_is_no_config_gets_no_fields():
    assert added.with_added({"seed": 1}) == {"seed": 1}
