"""Data sets by name: the folder of a prepared TFDS data set."""

import difflib
import importlib
import os
import re
from pathlib import Path

from ldm_jax.errors import InputError

# Name -> the module whose `prepare(data_dir, manual_dir)` prepares the data set at the first call.
BUILDERS = {
    "fashion_mnist": "ldm_jax.data.fashion_mnist",
    "emoji": "ldm_jax.data.emoji",
    "folder": "ldm_jax.data.captioned_folder",
    "concept": "ldm_jax.data.concept_folder",
    "images": "ldm_jax.data.own_images",
}

NAME = re.compile(r"(?P<name>\w+)(/(?P<config>\w[\w.-]*))?(:(?P<version>\d+\.\d+\.\d+))?")


def find(name: str, data_dir: Path, manual_dir: Path | None = None) -> Path:
    """The folder of a prepared data set.

    Args:
        name: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION, as in TFDS; without a version the highest.
        data_dir: searched first; then TFDS's own folder, $TFDS_DATA_DIR or ~/tensorflow_datasets.
        manual_dir: the folder of source files for `BUILDERS`.

    Raises:
        InputError: the data set does not exist, or has several configs and the name has none.
    """
    if name in BUILDERS:
        return importlib.import_module(BUILDERS[name]).prepare(data_dir, manual_dir)
    parts = NAME.fullmatch(name)
    if not parts:
        raise InputError(f"{name!r} is no data set's name: it should read NAME[/CONFIG][:VERSION], as in TFDS")
    homes = [data_dir, Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()]
    for home in homes:
        folder = home / parts["name"] / (parts["config"] or "")
        versions = _versions(folder)
        if not versions and not parts["config"]:
            folder = _only_config(folder) or folder
            versions = _versions(folder)
        if parts["version"] in versions:
            return folder / parts["version"]
        if versions and not parts["version"]:
            return folder / versions[-1]
    raise InputError(_not_found(name, homes))


def _versions(folder: Path) -> list[str]:
    """The versions prepared in a folder, the highest last."""
    names = [path.parent.name for path in folder.glob("*/dataset_info.json")]
    versions = [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    return sorted(versions, key=lambda version: [int(number) for number in version.split(".")])


def _only_config(folder: Path) -> Path | None:
    """The folder of the only config of a data set; None if it has no configs."""
    configs = sorted(path for path in folder.glob("*") if _versions(path))
    if len(configs) > 1:
        names = ", ".join(f"{folder.name}/{path.name}" for path in configs)
        raise InputError(f"data set {folder.name!r} in {folder.parent} has several configs; name one of: {names}")
    return configs[0] if configs else None


def _not_found(name: str, homes: list[Path]) -> str:
    prepared = [path.relative_to(home) for home in homes for path in home.glob("*/**/dataset_info.json")]
    known = {str(path.parent.parent) for path in prepared} | BUILDERS.keys()
    close = difflib.get_close_matches(name.split(":")[0], known, n=3)
    there = f"did you mean {' or '.join(close)}?" if close else f"there is: {', '.join(sorted(known))}."
    return (
        f"data set {name!r} is not prepared in {' or '.join(map(str, homes))}; {there} "
        f"To prepare one of TFDS's: tfds build {name} --file_format=array_record --data_dir={homes[0]}; "
        f"your own images: python -m ldm_jax.data.image_folder --help"
    )
