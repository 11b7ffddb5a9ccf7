"""Config fields and flags that were renamed: the old names keep working, with one line of warning."""

import sys
from typing import Any

from ml_collections import ConfigDict

FIELDS = {
    "autoencoder.kind": "autoencoder.type",
    "concat.kind": "concat.type",
    "data.kind_key": "data.group_key",
    "diffusion.bound_weight": "diffusion.vlb_weight",
    "diffusion.train_text": "diffusion.train_text_encoder",
    "evaluation.bound_examples": "evaluation.vlb_examples",
}
FLAGS = {"clip_scale": "clip_guidance_scale", "map": "concat_image"}
FIRST_NAMES = {new: old for old, new in FIELDS.items()}


def rename_arguments(argv: list[str]) -> list[str]:
    """The command line with today's names of flags and of --config.FIELDs."""
    names = {f"--{old}": f"--{new}" for old, new in FLAGS.items()}
    names |= {f"--config.{old}": f"--config.{new}" for old, new in FIELDS.items()}
    renamed = []
    for argument in argv:
        name, *value = argument.split("=", 1)
        if name.startswith("-"):
            name = f"--{name.lstrip('-')}"
        if name in names:
            _warn(name, names[name])
            argument = "=".join((names[name], *value))
        renamed.append(argument)
    return renamed


def rename_fields(config: ConfigDict) -> None:
    """Renames the fields of a config in place: of one whose file still sets an old name."""
    for old, new in FIELDS.items():
        section, name = old.split(".")
        if isinstance(config.get(section), ConfigDict) and name in config[section]:
            _warn(f"config.{old}", f"config.{new}")
            with config[section].unlocked() as fields:
                fields[new.split(".")[1]] = fields[name]
                del fields[name]


def rename_saved(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved config.json with today's names."""
    fields = dict(fields)
    for old, new in FIELDS.items():
        section, name = old.split(".")
        if isinstance(fields.get(section), dict) and name in fields[section]:
            fields[section] = {n if n != name else new.split(".")[1]: v for n, v in fields[section].items()}
    return fields


def _warn(old: str, new: str) -> None:
    print(f"warning: {old} is now called {new}", file=sys.stderr)
