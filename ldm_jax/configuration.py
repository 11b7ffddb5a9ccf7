"""Configs: saved, read back, compared."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.errors import InputError

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
    return ConfigDict(_tuples(fields)).lock()


def identity(config: ConfigDict, sections: tuple[str, ...]) -> str:
    """A hash of the fields below `sections`, e.g. ("seed", "data", "autoencoder")."""
    free = tuple(name for name in FREE if name not in sections)
    fields = {n: value for n, value in flatten(config).items() if n.startswith(sections) and not n.startswith(free)}
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
