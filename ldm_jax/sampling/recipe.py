"""What is asked of a trained model: every choice that its pictures depend on, written into each of them."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline.model import Trained
from ldm_jax.pipeline.upscaler import NOISE_LEVEL
from ldm_jax.sampling import guidance_models, image_grids
from ldm_jax.sampling.guidance_models import Guides


class Recipe(NamedTuple):
    """`num` pictures, whose classes go round `labels` ([] = no class) or `prompts`, made as the rest says."""

    num: int
    labels: list[int]
    prompts: list[str]
    seed: int
    guidance: float
    guidance_interval: list[float]
    guidance_rescale: float
    threshold: float
    sampler: str
    steps: int
    spacing: str | list[int]
    eta: float
    churn: float
    variance: str
    dtype: str
    size: list[int]  # height and width
    negative_prompt: str | None = None  # what guidance leads away from; None = nothing
    classifier: str = ""  # a run folder with a classifier that guides as well
    classifier_scale: float = 0.0
    clip: str = ""  # a run folder with a CLIP that guides as well: towards `prompts`, in turn
    clip_scale: float = 0.0
    to_prompt: str = ""  # from the one prompt to this one, from the same noise
    negative_label: int = -1
    vae_tiling: bool = False  # pictures larger than the autoencoder was trained on go through it in tiles
    init_image: str = ""  # begin from this picture, not from noise alone
    strength: float = 1.0  # the share of the steps that is done from there
    mask: str = ""  # the white part of init_image is drawn, the rest kept
    outpaint: str = ""  # init_image is continued on this side by so many pixels, e.g. "right:8"
    resample: int = 1  # RePaint: how often each part of the way is gone
    resample_jump: int = 1  # and of how many steps a part is
    to_seed: int = -1  # from the noise of `seed` to that of this one
    to_image: str = ""  # from the noise of init_image to that of this one
    invert: bool = False  # begin from init_image's own noise
    init_latents: str = ""  # the noise itself
    map: str = ""  # of a model with a map condition: the small picture, or the map of segments
    noise_level: int = -1  # of the map of a diffusers upscaler; -1 = the model is none
    map_split: str = ""  # or the split that sample i's map is taken from, of its picture number i


FEW = 8  # texts that a run draws by, unless it is told which
LOOKED_AT = 64  # pictures, for as many texts that differ


def map_split(model: Trained) -> str:
    """Where maps come from unless a user gives one: the test split of a run; other models know no data set."""
    return "" if model.config.concat.kind == "none" else model.config.data.test_split


def from_picture(model: Trained, path: Path) -> Recipe:
    """The recipe that made a picture.

    Raises:
      InputError: the picture has no recipe, or another model drew it, or one of its inputs has changed since.
    """
    found = image_grids.read_recipe(path)
    missing = [name for name in Recipe._fields if name not in found and name not in Recipe._field_defaults]
    if missing:
        raise InputError(f"--from_recipe={path} is of another version: it says nothing of {', '.join(missing)}")
    if found.get("model") != pipeline_model.fingerprint(model):
        raise InputError(f"--from_recipe={path} was drawn by another model ({found.get('model')}) than --model")
    recipe = Recipe(**{name: found[name] for name in Recipe._fields if name in found})  # older ones have fewer
    if recipe.dtype != model.config.dtype:
        raise InputError(f"--from_recipe={path} was drawn in {recipe.dtype}; add --dtype={recipe.dtype}")
    for file, digest in digests(recipe, guides_of(model, recipe)).items():
        if found.get("inputs", {}).get(file) != digest:
            raise InputError(f"--from_recipe={path} was drawn from another {file} than the one that is there now")
    return recipe


def of_config(model: Trained, dataset: Dataset) -> Recipe:
    """The recipe that ends a run: as its config has it, or of a model of texts by those of `dataset`.

    That is the training split of a run with a CLIP of its own, whose pictures each give their caption; else the test
    split, of which a few do, or, where these are what is drawn from, each.
    """
    sampling, pretrained = model.config.sampling, model.pretrained
    prompts, labels = list(sampling.prompts), list(range(len(sampling.prompts or model.class_names)))
    own = "clip" in model.config.stages if pretrained and model.config.get("stages") else False
    if pretrained and pretrained.encoders and sampling.num and (own or not prompts):
        prompts, labels = captions_of(dataset, sampling.num if own or map_split(model) else 0)
    return Recipe(
        num=sampling.num,
        labels=labels,
        prompts=prompts,
        seed=model.config.seed,
        guidance=sampling.guidance,
        guidance_interval=list(sampling.guidance_interval),
        guidance_rescale=sampling.guidance_rescale,
        threshold=sampling.threshold,
        sampler=sampling.sampler,
        steps=sampling.steps,
        spacing=sampling.spacing,
        eta=sampling.eta,
        churn=sampling.churn,
        variance=sampling.variance,
        dtype=model.config.dtype,
        size=list(pipeline_from_config.picture_size(model.config)),
        noise_level=NOISE_LEVEL if pretrained and pretrained.upscaling else -1,
        map_split=map_split(model),
    )


def captions_of(dataset: Dataset, pictures: int) -> tuple[list[str], list[int]]:
    """The first few texts of a split that differ, in turn; or those of its first `pictures`, and which each one has."""
    label = dataset[np.arange(min(pictures or LOOKED_AT, len(dataset)))]["label"].tolist()
    distinct = list(dict.fromkeys(label))
    if not pictures:
        distinct = label = distinct[:FEW]
    return [dataset.class_names[number] for number in distinct], [distinct.index(number) for number in label]


def guides_of(model: Trained, recipe: Recipe) -> Guides:
    """What guides beside the model's own conditions."""
    return Guides(
        guidance_models.classifier_for(Path(recipe.classifier), model) if recipe.classifier else None,
        guidance_models.clip_for(Path(recipe.clip), model) if recipe.clip else None,
    )


def digests(recipe: Recipe, guided_by: Guides) -> dict[str, str]:
    """File -> hash, of all that a recipe reads; a file that is not there has none."""
    names = ("init_image", "mask", "to_image", "init_latents", "map")
    files = [getattr(recipe, name) for name in names if getattr(recipe, name)]
    digests = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in files if Path(file).is_file()}
    named = {getattr(recipe, name): guide for name, guide in guided_by._asdict().items() if guide}
    return digests | {folder: guidance_models.fingerprint(guide) for folder, guide in named.items()}
