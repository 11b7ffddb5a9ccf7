"""The recipe of samples: everything that they depend on, stored as JSON in each PNG and read back from it.

Recipes of versions before 0.2 are flat, with sentinels for None.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import Inpainting, LowResolution
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion, Params, fingerprint
from ldm_jax.runtime.terminal import warn
from ldm_jax.sampling.image_grids import read_recipe


class Solving(NamedTuple):
    """The sampler and its steps: arguments of `solvers.make_table`, and of dynamic thresholding."""

    sampler: str
    steps: int
    spacing: str | list[int]
    eta: float = 0.0
    churn: float = 0.0
    variance: str = "fixed_small"
    threshold: float = 0.0


class Guidance(NamedTuple):
    """Classifier-free guidance or autoguidance, classifier and CLIP guidance."""

    scale: float
    interval: list[float]
    rescale: float = 0.0
    negative_prompt: str | None = None
    negative_label: int | None = None
    classifier: str | None = None  # run folder of a classifier
    classifier_scale: float = 0.0
    clip: str | None = None  # run folder of a CLIP, which guides to the prompts in turn
    clip_guidance_scale: float = 0.0
    parallel: float = 1.0  # adaptive projected guidance: see `guidance.Projection`
    max_norm: float = 0.0  # and its limit; 0 = none
    # The weaker model of autoguidance, in place of the null condition: PATH[@STEP], or @STEP of the model's own run.
    guide_model: str | None = None
    guide_null: bool = False  # this weaker model has the null condition, as in classifier-free guidance
    cfgpp: bool = False  # CFG++ (see `guidance.cfg_plus_plus`), of which scale is lambda


class Edit(NamedTuple):
    """Image editing: what sampling starts from, if not from the seed's noise alone."""

    init_image: str | None = None
    strength: float = 1.0  # the fraction of the steps that are run from there
    mask: str | None = None  # the white part of init_image is sampled, the rest kept
    outpaint: str | None = None  # side and pixels by which init_image is extended, e.g. "right:8"
    resample: int = 1  # RePaint's number of repetitions
    resample_jump: int = 1  # and the steps of each
    invert: bool = False  # start from the noise of init_image (DDIM inversion)
    to_image: str | None = None  # interpolate from the noise of init_image to that of this image
    to_seed: int | None = None  # interpolate from the noise of the seed to that of this seed
    to_prompt: str | None = None  # interpolate from the one prompt to this prompt
    init_latents: str | None = None  # file of the initial noise


class ConcatInput(NamedTuple):
    """The input of concat conditioning, unless `Edit` has it: an image, or a split whose images are degraded."""

    image: str | None = None  # the low-resolution image, or the segmentation map
    split: str | None = None  # sample i is made of image i of this split
    noise_level: int | None = None  # of an upscaler's low-resolution image


class Recipe(NamedTuple):
    """The recipe of `num` samples: of the classes `labels` in turn ([] = none), or of the prompts `prompts[label]`."""

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
    refiner: str | None = None  # the model that goes on from the latents of the first
    refiner_start: float = 1.0  # at this fraction of the process, from noise
    ema_sigma_rel: float | None = None  # length of the power function average that the model is; None: its EMA


CFGPP_SAMPLERS = ("ddim", "euler", "euler_a")  # those whose steps are a z0_hat, an eps and noise
LAST_SEED = 2**32 - 1
# The ranges of numbers, by the names of fields, of which no two sections have one.
RANGES = {
    **dict.fromkeys(("seed", "to_seed"), (0, LAST_SEED)),
    **dict.fromkeys(("num", "size", "steps", "resample", "resample_jump"), (1, math.inf)),
    **dict.fromkeys(("labels", "negative_label", "noise_level", "churn", "max_norm"), (0, math.inf)),
    **dict.fromkeys(("scale", "classifier_scale", "clip_guidance_scale"), (0, math.inf)),
    **dict.fromkeys(("eta", "threshold", "rescale", "parallel", "strength", "refiner_start"), (0, 1)),
}
NO_EDIT = Edit()
SECTIONS = {"solving": Solving, "guidance": Guidance, "edit": Edit, "concat": ConcatInput}

# Flat names of versions before 0.2 where they differ, and their sentinels for None where these are not "".
FLAT = {"guidance.scale": "guidance", "guidance.interval": "guidance_interval", "guidance.rescale": "guidance_rescale",
        "guidance.clip_guidance_scale": "clip_scale", "concat.image": "map", "concat.split": "map_split"}  # fmt: skip
SENTINELS = {"negative_label": -1, "to_seed": -1, "noise_level": -1}


def default_recipe(
    model: LatentDiffusion, num: int, seed: int, labels: list[int], prompts: list[str], sampler: str | None = None
) -> Recipe:
    """The recipe of a model's own sampling defaults, or those of another sampler; raises InputError for one without."""
    defaults = model.defaults
    guidance = Guidance(defaults.guidance, list(defaults.guidance_interval), defaults.guidance_rescale)
    if 0 < defaults.guide_step < model.origin.step:
        guidance = guidance._replace(guide_model=f"@{defaults.guide_step}", guide_null=True)
    return Recipe(
        num, seed, labels, prompts, list(model.image_shape[:2]), model.dtype,
        solving=solving_defaults(model, sampler or defaults.sampler), guidance=guidance,
        concat=ConcatInput(split=defaults.concat_split), ema_sigma_rel=model.origin.ema_sigma_rel,
    )  # fmt: skip


def is_conditional(model: LatentDiffusion) -> bool:
    """Whether a model is conditioned on classes or texts, so that it has classifier-free guidance."""
    return bool(model.class_names) or isinstance(model.conditioning, TextConditioning)


def check_side(name: str, side: int, model: LatentDiffusion) -> None:
    """Raises InputError, which names the flag or argument, for a height or width that the model does not sample."""
    factor = model.size_multiple
    if side % factor:
        nearest = max(side // factor, 1) * factor
        what = "a latent" if factor == model.first_stage.downsampling else "a patch of latents"
        raise InputError(f"{name}={side} must be a multiple of {factor}, the pixels of {what}, e.g. {nearest}")
    if isinstance(model.concat, LowResolution) and side % model.concat.factor:
        raise InputError(f"{name}={side} must be a multiple of {model.concat.factor}, the model's enlargement")


def without_guide_model(guidance: Guidance) -> Guidance:
    """The guidance with classifier-free guidance in place of autoguidance."""
    return guidance._replace(guide_model=None, guide_null=False)


def solving_defaults(model: LatentDiffusion, sampler: str, steps: int | None = None) -> Solving:
    """The solver's settings of a model with this sampler; raises InputError if the model cannot use it."""
    options, fields = model.defaults.solver(sampler).options, ("spacing", "eta", "churn", "variance")
    steps = model.defaults.steps if steps is None else steps
    own = {name: options[name] for name in fields if name in options}
    return Solving(sampler, steps, threshold=model.defaults.threshold, **own)


def with_guidance(model: LatentDiffusion, recipe: Recipe) -> Recipe:
    """The recipe with the scale of classifier-free guidance as diffusers has it; prints a warning if it changes.

    Of a text-to-image model a scale of at most 1 means no guidance: the cards of distilled models say 0. The
    unconditional model is that of the empty prompt, or the base of classifier and CLIP guidance. Raises InputError for
    options of classifier-free guidance on a model whose input the scale is.
    """
    guidance = recipe.guidance
    if model.guidance_dim is not None:
        own = {"negative_prompt": None, "rescale": 0.0, "interval": [0.0, 1.0]}
        own |= {"parallel": 1.0, "max_norm": 0.0, "guide_model": None, "guide_null": False, "cfgpp": False}
        for name in (name for name, value in own.items() if getattr(guidance, name) != value):
            why = "the guidance scale is an input of this model, which is called once a step"
            raise InputError(f"the guidance option {name} is for classifier-free guidance; {why}")
    texts = isinstance(model.conditioning, TextConditioning) and any(recipe.prompts)
    others = guidance.classifier or guidance.clip or guidance.guide_model or guidance.cfgpp
    if not texts or guidance.scale >= 1 or others:
        return recipe
    what = 'as in diffusers, no guidance; --prompt="" samples without a condition'
    warn(f"warning: a guidance scale of {guidance.scale:g} means, {what}")
    return recipe._replace(guidance=guidance._replace(scale=1.0))


def check_cfgpp(model: LatentDiffusion, recipe: Recipe) -> None:
    """Raises InputError for a recipe with CFG++ that has another sampler, scale, guidance or edit than it goes with."""
    guidance, edit = recipe.guidance, recipe.edit
    if not guidance.cfgpp:
        return
    if recipe.solving.sampler not in CFGPP_SAMPLERS:
        sampler = f"--cfgpp is not defined for --sampler={recipe.solving.sampler}"
        raise InputError(f"{sampler}; it must be one of {', '.join(CFGPP_SAMPLERS)}")
    if guidance.scale > 1:
        raise InputError(f"--guidance={guidance.scale:g} is lambda with --cfgpp; it must be from 0 to 1, e.g. 0.6")
    if model.mean_flow:
        raise InputError("--cfgpp is not defined for a MeanFlow model, whose steps have no eps")
    others = {"guidance_rescale": guidance.rescale, "guidance_parallel": guidance.parallel != 1,
              "guidance_max_norm": guidance.max_norm, "guide_model": guidance.guide_model,
              "classifier": guidance.classifier, "clip": guidance.clip, "invert": edit.invert,
              "to_image": edit.to_image}  # fmt: skip
    if both := next((name for name, value in others.items() if value), None):
        raise InputError(f"--cfgpp and --{both} do not go together; leave one of them out")


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts."""
    return {n: value._asdict() if n in SECTIONS else value for n, value in recipe._asdict().items()}


def from_json(fields: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of nested dicts or of a flat one; raises InputError, which names `where`, for wrong fields."""
    fields = fields if isinstance(fields.get("guidance"), Mapping) else _nested(fields)
    for name in SECTIONS:
        if not isinstance(fields.get(name, {}), Mapping):
            raise InputError(f"{where} has a damaged recipe: its {name} is {fields[name]!r}")
    sections = {name: _read(section, fields.get(name, {}), where) for name, section in SECTIONS.items()}
    return _read(Recipe, {**fields, **sections}, where)


def _read(section: type, fields: Mapping[str, Any], where: str) -> Any:
    missing = [name for name in section._fields if name not in fields and name not in section._field_defaults]
    if missing:
        raise InputError(f"{where} is of another version: its recipe lacks {', '.join(missing)}")
    for name, annotation in get_type_hints(section).items():
        if name in fields and not (_is_of(fields[name], annotation) and _in_range(name, fields[name])):
            raise InputError(f"{where} has a damaged recipe: its {name} is {fields[name]!r}")
    return section(**{name: fields[name] for name in section._fields if name in fields})


def _is_of(value: Any, annotation: Any) -> bool:
    """Whether a value of JSON is of a field's type; numbers must be finite."""
    if isinstance(annotation, UnionType):
        return any(_is_of(value, each) for each in get_args(annotation))
    if get_origin(annotation) is list:
        return isinstance(value, list) and all(_is_of(item, get_args(annotation)[0]) for item in value)
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is annotation


def _in_range(name: str, value: Any) -> bool:
    """Whether a field's numbers are in their range, and as many as there must be."""
    if name == "interval":
        return len(value) == 2 and 0 <= value[0] < value[1] <= 1
    if name not in RANGES or value is None:
        return True
    (lowest, highest), numbers = RANGES[name], value if isinstance(value, list) else [value]
    return all(lowest <= number <= highest for number in numbers) and (name != "size" or len(numbers) == 2)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat recipe in sections, with None for sentinels."""
    nested = {**flat, **{section: {} for section in SECTIONS}}
    for section, fields in SECTIONS.items():
        for name in fields._fields:
            old = FLAT.get(f"{section}.{name}", name)
            if old in flat:
                none = name != "negative_prompt" and flat[old] == SENTINELS.get(name, "")
                nested[section][name] = None if none else flat[old]
    return nested


def from_png(path: Path, model: LatentDiffusion, params: Params) -> tuple[Recipe, dict[str, str]]:
    """The recipe in a PNG, and the recorded hashes of its input files; raises InputError for one of another model."""
    fields = read_recipe(path)
    recipe = from_json(fields, f"--from_recipe={path}")
    if recipe.ema_sigma_rel != model.origin.ema_sigma_rel:
        other = "the model's own EMA; leave out --ema_sigma_rel"
        if recipe.ema_sigma_rel is not None:
            other = f"another EMA; add --ema_sigma_rel={recipe.ema_sigma_rel!r}"
        raise InputError(f"--from_recipe={path} was sampled with {other}")
    if fields.get("model") != fingerprint(model, params):
        raise InputError(f"--from_recipe={path} was sampled from another model ({fields.get('model')}) than --model")
    if recipe.dtype != model.dtype:
        raise InputError(f"--from_recipe={path} was sampled in {recipe.dtype}; add --dtype={recipe.dtype}")
    _check_fits(recipe, model, f"--from_recipe={path}")
    inputs = fields.get("inputs", {})
    if not isinstance(inputs, Mapping):
        raise InputError(f"--from_recipe={path} has a damaged recipe: its inputs are {inputs!r}")
    return recipe, inputs


def _check_fits(recipe: Recipe, model: LatentDiffusion, where: str) -> None:
    """Raises InputError, which names `where`, for classes, prompts or a size that a model does not have."""
    texts = isinstance(model.conditioning, TextConditioning)
    known, negative = len(recipe.prompts if texts else model.class_names), recipe.guidance.negative_label
    if texts and not recipe.prompts:
        raise InputError(f"{where} has a damaged recipe: it has no prompts")
    if wrong := [label for label in recipe.labels if label >= known]:
        raise InputError(f"{where} has a damaged recipe: its labels have {wrong[0]}; they must be below {known}")
    if negative is not None and negative >= len(model.class_names):
        raise InputError(f"{where} has a damaged recipe: its negative_label is {negative}")
    for name, side in zip(("height", "width"), recipe.size):
        check_side(f"{where} has a damaged recipe: {name}", side, model)
    _check_edit(recipe, model, where)


def _check_edit(recipe: Recipe, model: LatentDiffusion, where: str) -> None:
    """Raises InputError, which names `where`, for an edit or concat conditioning that lacks an image or a prompt."""
    edit, concat, texts = recipe.edit, recipe.concat, isinstance(model.conditioning, TextConditioning)
    if edit.to_prompt is not None and not (texts and len(recipe.prompts) == 1):
        raise InputError(f"{where} has a damaged recipe: its to_prompt needs one prompt of a text-to-image model")
    for name in ("mask", "outpaint", "to_image", "invert"):
        if getattr(edit, name) and not edit.init_image:
            raise InputError(f"{where} has a damaged recipe: its {name} needs an init_image")
    inpaints = isinstance(model.concat, Inpainting) and (edit.mask or edit.outpaint)
    if model.concat and not (inpaints or concat.image or concat.split):
        raise InputError(f"{where} has a damaged recipe: it has no input of the model's concat conditioning")
