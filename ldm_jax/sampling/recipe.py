"""A recipe: every choice that a model's samples depend on, written into each PNG and read back from it.

`image_grids.save_png` keeps it as JSON, nested as here. Recipes of versions before 0.2 are flat, with sentinels.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.errors import InputError
from ldm_jax.pipeline.model import LatentDiffusion, Params, fingerprint
from ldm_jax.sampling.image_grids import read_recipe


class Solving(NamedTuple):
    """The solver and its steps: arguments of `solvers.make_table`, and the bound of z0_hat."""

    sampler: str
    steps: int
    spacing: str | list[int]
    eta: float = 0.0
    churn: float = 0.0
    variance: str = "fixed_small"
    threshold: float = 0.0


class Guidance(NamedTuple):
    """Guidance: by the model itself, a classifier, a CLIP."""

    scale: float
    interval: list[float]
    rescale: float = 0.0
    negative_prompt: str | None = None
    negative_label: int | None = None
    classifier: str | None = None  # a run folder with a classifier
    classifier_scale: float = 0.0
    clip: str | None = None  # a run folder with a CLIP, which guides to the prompts, in turn
    clip_guidance_scale: float = 0.0


class Edit(NamedTuple):
    """What sampling begins from, if not from the seed's noise alone."""

    init_image: str | None = None
    strength: float = 1.0  # the fraction of the steps that is run from there
    mask: str | None = None  # the white part of init_image is sampled, the rest kept
    outpaint: str | None = None  # init_image is extended on this side by so many pixels, e.g. "right:8"
    resample: int = 1  # RePaint's number of repetitions
    resample_jump: int = 1  # and the steps of each
    invert: bool = False  # begin from init_image's own noise (DDIM inversion)
    to_image: str | None = None  # interpolate from the noise of init_image to that of this one
    to_seed: int | None = None  # interpolate from the noise of the seed to that of this one
    to_prompt: str | None = None  # interpolate from the one prompt to this one
    init_latents: str | None = None  # the initial noise itself


class ConcatInput(NamedTuple):
    """What a model with concat conditioning is given beside `Edit`: an image, or a split whose images are degraded."""

    image: str | None = None  # the low-resolution image, or the segmentation map
    split: str | None = None  # sample i is made of image i of this split
    noise_level: int | None = None  # of an upscaler's low-resolution image


class Recipe(NamedTuple):
    """`num` samples, whose classes are `labels` in turn ([] = none), or whose prompts are `prompts[label]`."""

    num: int
    seed: int
    labels: list[int]
    prompts: list[str]
    size: list[int]  # height and width
    dtype: str
    solving: Solving
    guidance: Guidance
    edit: Edit = Edit()
    concat: ConcatInput = ConcatInput()
    vae_tiling: bool = False


NO_EDIT = Edit()
SECTIONS = {"solving": Solving, "guidance": Guidance, "edit": Edit, "concat": ConcatInput}

# The flat names of versions before 0.2 that differ, and what stood for None there, if not "".
FLAT = {
    "guidance.scale": "guidance",
    "guidance.interval": "guidance_interval",
    "guidance.rescale": "guidance_rescale",
    "guidance.clip_guidance_scale": "clip_scale",
    "concat.image": "map",
    "concat.split": "map_split",
}
SENTINELS = {"negative_label": -1, "to_seed": -1, "noise_level": -1}


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts."""
    return {n: value._asdict() if n in SECTIONS else value for n, value in recipe._asdict().items()}


def from_json(found: Mapping[str, Any], where: str) -> Recipe:
    """The inverse of `to_json`, also of a flat recipe; raises InputError, which names `where`, for fields that lack."""
    found = found if isinstance(found.get("guidance"), Mapping) else _nested(found)
    sections = {name: _read(section, found.get(name, {}), where) for name, section in SECTIONS.items()}
    return _read(Recipe, {**found, **sections}, where)


def _read(kind: type, fields: Mapping[str, Any], where: str) -> Any:
    missing = [name for name in kind._fields if name not in fields and name not in kind._field_defaults]
    if missing:
        raise InputError(f"{where} is of another version: its recipe lacks {', '.join(missing)}")
    return kind(**{name: fields[name] for name in kind._fields if name in fields})


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat recipe in sections, without sentinels."""
    nested = dict(flat)
    for section, kind in SECTIONS.items():
        nested[section] = {}
        for name in kind._fields:
            old = FLAT.get(f"{section}.{name}", name)
            if old in flat:
                none = name != "negative_prompt" and flat[old] == SENTINELS.get(name, "")
                nested[section][name] = None if none else flat[old]
    return nested


def from_png(path: Path, model: LatentDiffusion, params: Params) -> tuple[Recipe, dict[str, str]]:
    """The recipe that a PNG was made by, and the hashes of the files that it read.

    Raises:
      InputError: the PNG has no recipe, or it was sampled from another model.
    """
    found = read_recipe(path)
    recipe = from_json(found, f"--from_recipe={path}")
    if found.get("model") != fingerprint(model, params):
        raise InputError(f"--from_recipe={path} was sampled from another model ({found.get('model')}) than --model")
    if recipe.dtype != model.dtype:
        raise InputError(f"--from_recipe={path} was sampled in {recipe.dtype}; add --dtype={recipe.dtype}")
    return recipe, found.get("inputs", {})


def file_hashes(recipe: Recipe) -> dict[str, str]:
    """File -> hash, of the files that a recipe reads and that exist."""
    edit = recipe.edit
    files = [edit.init_image, edit.mask, edit.to_image, edit.init_latents, recipe.concat.image]
    existing = [file for file in files if file and Path(file).is_file()]
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in existing}
