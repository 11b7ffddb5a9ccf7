"""Configs: flattened, saved as JSON, read back with defaults for missing fields, hashed and compared."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.config import defaults
from ldm_jax.config.added import is_as_before, is_config, with_added
from ldm_jax.config.fields import STAGES
from ldm_jax.config.renamed import FIRST_NAMES, rename_saved
from ldm_jax.errors import InputError

# Fields and sections that may change between two calls of the same run.
FREE = ("log_every", "checkpoint_every", "keep_checkpoints", "wandb", "data.dir", "data.memory_limit_gb",
        "parallel", "sampling", "evaluation")  # fmt: skip

# Fields of a stage that may change, too, until a later stage is trained: training goes on from the last checkpoint.
CONTINUED = ("steps", "learning_rate")


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """The fields of a config by their full names, e.g. {"diffusion.steps": 1000}."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, (dict, ConfigDict))
        fields |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return fields


def to_json(config: ConfigDict) -> str:
    """The resolved config as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(path: Path) -> ConfigDict:
    """The config in a run folder's config.json; raises InputError if the file is missing or damaged."""
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no run folder: it has no config.json") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} is damaged: it must hold a JSON object of config fields")
    return from_fields(fields)


def from_fields(fields: dict[str, Any]) -> ConfigDict:
    """The locked config of parsed JSON: renamed fields by today's names, `added` ones as before, lists as tuples."""
    return ConfigDict(_tuples(with_added(rename_saved(fields)))).lock()


def read_with_defaults(path: Path) -> ConfigDict:
    """As `from_json`, with the defaults of missing fields (see `with_defaults`)."""
    return with_defaults(from_json(path), str(path))


def with_defaults(config: ConfigDict, where: str) -> ConfigDict:
    """The config of a version before 0.2, read from `where`, with the defaults of the fields it lacks; prints these.

    Fields added later are there already (see `added`). What is no config of ldm_jax is not changed.
    """
    if not is_config(config.to_dict()):
        return config
    default, fields = defaults.get_config(), flatten(config)
    missing = sorted(flatten(default).keys() - fields.keys())
    if not missing or any(name.startswith(f"{field}.") for name in missing for field in fields):
        return config
    sections = {name: name.split(".")[0] for name in missing}
    whole = {name for name, section in sections.items() if section != name and section not in config}
    named = dict.fromkeys(f"config.{sections[name]}.*" if name in whole else f"config.{name}" for name in missing)
    print(f"{where} is of an older version; as in ldm_jax/config/defaults.py are {', '.join(named)}")
    return ConfigDict(_merge(default.to_dict(), config.to_dict())).lock()


def _merge(default: dict, fields: dict) -> dict:
    nested = {name: _merge(default[name], v) for name, v in fields.items() if isinstance(default.get(name), dict)}
    return default | fields | nested


def identity(config: ConfigDict, sections: tuple[str, ...]) -> str:
    """A hash of the fields below `sections`, e.g. ("seed", "data", "autoencoder"), by their first names.

    A field of `added.ADDED` counts only with another value than that of configs without it.
    """
    free = tuple(name for name in FREE if name not in sections)
    fields = {n: value for n, value in flatten(config).items() if n.startswith(sections) and not n.startswith(free)}
    fields = {FIRST_NAMES.get(n, n): value for n, value in fields.items() if not is_as_before(n, value)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, str]:
    """The fields, except those in FREE, in which two configs differ: name -> 'name: old -> new'."""
    before, after = flatten(old), flatten(new)
    return {
        name: f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after)
        if before.get(name) != after.get(name) and not name.startswith(FREE)
    }


def open_fields(config: ConfigDict) -> list[str]:
    """The fields that are None: they follow from the training images (see `data.from_images`)."""
    return [name for name, value in flatten(config).items() if value is None]


def is_continued(name: str) -> bool:
    """Whether a field, by its full name, is one of those of training that may change (see `CONTINUED`)."""
    stage, _, field = name.partition(".")
    return stage in STAGES and field in CONTINUED


def training_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of training that may change (see `CONTINUED`), by their full names."""
    return {name: value for name, value in flatten(config).items() if is_continued(name)}


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
