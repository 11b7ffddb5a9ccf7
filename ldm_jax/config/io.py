"""Configs: saved, read back, compared."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.config import defaults
from ldm_jax.config.renamed import FIRST_NAMES, rename_saved
from ldm_jax.errors import InputError

# The sections that there have been since the first version.
ALWAYS = ("data", "autoencoder", "diffusion", "unet", "sampling", "evaluation")

# What may change between two runs of the same command without making it another run.
FREE = (
    "sampling",
    "evaluation",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "data.dir",
    "data.memory_limit_gb",
)


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Field -> value with dotted names, e.g. "diffusion.steps"; tuples become lists, as JSON has them."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (dict, ConfigDict)):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def to_json(config: ConfigDict) -> str:
    """The resolved config, readable."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(path: Path) -> ConfigDict:
    """Reads a run folder's config.json; raises InputError if it is none."""
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no run folder: it has no config.json") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} is damaged: it holds no fields")
    return from_fields(fields)


def from_fields(fields: dict[str, Any]) -> ConfigDict:
    """The config of what `to_json` wrote, parsed."""
    return ConfigDict(_tuples(rename_saved(fields))).lock()


def of_run(path: Path) -> ConfigDict:
    """As `from_json`, of a run that is only read: `completed`."""
    return completed(from_json(path), str(path))


def completed(config: ConfigDict, where: str) -> ConfigDict:
    """The config with the fields that have come since it was written, as config/defaults.py has them; says which.

    A field's default is what was done before there was a field. What is no config of ours stays as it is.
    """
    if not all(isinstance(config.get(name), ConfigDict) for name in ALWAYS):
        return config
    wanted, given = flatten(defaults.get_config()), flatten(config)
    lacking = sorted(wanted.keys() - given.keys())
    if not lacking or any(name.startswith(f"{other}.") for name in lacking for other in given):
        return config
    named = dict.fromkeys(f"config.{_section_or_field(name, given)}" for name in lacking)
    print(f"{where} is of an older version; as in ldm_jax/config/defaults.py are {', '.join(named)}")
    whole = config.copy_and_resolve_references().unlock()
    for name in lacking:
        *sections, field = name.split(".")
        place = whole
        for section in sections:
            if section not in place:
                place[section] = ConfigDict()
            place = place[section]
        place[field] = wanted[name]
    return whole.lock()


def _section_or_field(name: str, given: dict[str, Any]) -> str:
    """The first section on the way to a field, "SECTION.*", of which nothing is given; or else the field."""
    parts = name.split(".")
    sections = (".".join(parts[:i]) + "." for i in range(1, len(parts)))
    return next((f"{section}*" for section in sections if not any(n.startswith(section) for n in given)), name)


def identity(config: ConfigDict, sections: tuple[str, ...]) -> str:
    """A hash of the fields below `sections`, e.g. ("seed", "data", "autoencoder"), by the names they had at first."""
    free = tuple(name for name in FREE if name not in sections)
    fields = {n: value for n, value in flatten(config).items() if n.startswith(sections) and not n.startswith(free)}
    fields = {FIRST_NAMES.get(name, name): value for name, value in fields.items()}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """The identifying fields in which two configs differ, as 'name: old -> new'."""
    before, after = _identifying(old), _identifying(new)
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after)
        if before.get(name) != after.get(name)
    ]


def _identifying(config: ConfigDict) -> dict[str, Any]:
    return {name: value for name, value in flatten(config).items() if not name.startswith(FREE)}


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
