"""Config fields that are left open, None, and follow from the training images: resolution, colour, steps, splits.

A rule for each field is in RULES. Steps grow as the fourth root of the number of images: 16 times the images get twice
the steps. The numbers are resolved once, before a run starts; its config.json has them, and resuming takes them from
there. A value on the command line replaces a rule's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config.io import open_fields
from ldm_jax.data.catalog import find
from ldm_jax.data.from_config import KEYS
from ldm_jax.data.own_images import HELD_OUT, num_held_out
from ldm_jax.data.records import Records, split_sizes
from ldm_jax.errors import InputError

SIZES = (16, 64)  # the smallest and the largest resolution, in pixels
SMALL = 32  # pixels: up to this resolution latents have more channels
STEPS = {"autoencoder": 2_000, "clip": 600, "diffusion": 2_000}  # for TYPICAL training images
TYPICAL, BOUNDS = 200, (0.5, 4)  # the bounds as multiples of the steps
SAMPLES = (100, 1_000)


class TrainingImages(NamedTuple):
    """What the rules depend on."""

    num: int
    num_test: int
    num_classes: int
    side: int  # pixels: the median of the images' shorter sides
    grey: bool  # all of them


def _image_size(images: TrainingImages, config: ConfigDict) -> int:
    """The images' own resolution within SIZES, as a multiple of the autoencoder's downsampling factor."""
    factor = 2 ** (len(config.autoencoder.block_out_channels) - 1)
    low, high = SIZES
    return min(max(images.side // factor * factor, low), high)


def _steps(stage: str) -> Callable[[TrainingImages, ConfigDict], int]:
    low, high = BOUNDS
    return lambda images, config: 100 * round(STEPS[stage] / 100 * min(max((images.num / TYPICAL) ** 0.25, low), high))


def _last_losses(config: ConfigDict) -> int:
    """The step from which LPIPS and the adversarial loss count: they are for images that are nearly right."""
    return max(1, config.autoencoder.steps * 7 // 10)


# Field -> its value by the images and by the fields above it.
RULES: dict[str, Callable[[TrainingImages, ConfigDict], int]] = {
    "data.image_size": _image_size,
    "data.channels": lambda images, config: 1 if images.grey else 3,
    "autoencoder.latent_channels": lambda images, config: 8 if config.data.image_size <= SMALL else 4,
    "autoencoder.steps": _steps("autoencoder"),
    "autoencoder.loss.perceptual_start": lambda images, config: _last_losses(config),
    "autoencoder.loss.adversarial_start": lambda images, config: _last_losses(config),
    "clip.patch_size": lambda images, config: 4 if config.data.image_size <= SMALL or config.data.image_size % 8 else 8,
    "clip.steps": _steps("clip"),
    "diffusion.steps": _steps("diffusion"),
    "sampling.num": lambda images, config: min(max(SAMPLES[0], images.num_test, images.num_classes), SAMPLES[1]),
    "evaluation.resize": lambda images, config: max(SMALL, config.data.image_size),
}
SPLITS = ("data.train_split", "data.test_split")


def resolve(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config with its open fields resolved: as in the run folder `workdir`, if that exists, or by the rules.

    Prints the values and what they follow from. Raises InputError if a field has no rule, or the data set cannot be
    read; RunError if it cannot be prepared.
    """
    names, recorded = open_fields(config), workdir / "config.json"
    if not names:
        return config
    if unknown := [name for name in names if name not in (*RULES, *SPLITS)]:
        raise InputError(f"config.{unknown[0]} is None; it must have a value")
    names = [name for name in (*SPLITS, *RULES) if name in names]
    if recorded.exists():
        saved = config_io.flatten(config_io.from_json(recorded))
        values, why = {name: saved.get(name) for name in names}, f"As in {recorded}"
    else:
        values, why = _from_data(config)
    print(f"{why}: {', '.join(f'{name}={value}' for name, value in values.items())}", flush=True)
    return _with(config, values)


def fill(config: ConfigDict, images: TrainingImages) -> dict[str, int]:
    """The values of the open fields of RULES for these images."""
    names = [name for name in RULES if name in open_fields(config)]
    for name in names:
        config = _with(config, {name: RULES[name](images, config)})
    values = config_io.flatten(config)
    return {name: values[name] for name in names}


def _from_data(config: ConfigDict) -> tuple[dict[str, Any], str]:
    """The values of all open fields by the data set, and a description of what they follow from."""
    data = config.data
    folder = find(data.name, Path(data.dir).expanduser(), Path(data.path).expanduser() if data.path else None)
    splits = {name: value for name, value in _splits(split_sizes(folder)).items() if name in open_fields(config)}
    data = _with(config, splits).data
    train, test = (
        Records(folder, split, **{name: data[name] for name in KEYS}) for split in (data.train_split, data.test_split)
    )
    side = int(np.median(train.shapes().min(axis=1)))
    images = TrainingImages(len(train), len(test), len(train.class_names), side, train.is_grey())
    colour = "grey" if images.grey else "in colour"
    why = f"From the data ({images.num:,} images to train on, {side} pixels, {colour})"
    return splits | fill(config, images), why


def _splits(sizes: dict[str, int]) -> dict[str, str]:
    """The training and the test split of a data set: its own, or parts of "train"."""
    if held_out := [name for name in HELD_OUT if name in sizes]:
        return dict(zip(SPLITS, ("train", held_out[0])))
    kept = sizes["train"] - num_held_out(sizes["train"])
    return dict(zip(SPLITS, (f"train[:{kept}]", f"train[{kept}:]")))


def _with(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    changed = config.copy_and_resolve_references().unlock()
    changed.update_from_flattened_dict(values)
    return changed.lock()
