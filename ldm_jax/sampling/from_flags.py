"""The recipe of command-line flags, with the model's sampling defaults for those left out."""

import math
import sys
from pathlib import Path
from typing import Any

from absl.flags import FlagValues

from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import Inpainting, LowResolution
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.runtime.terminal import warn
from ldm_jax.sampling import image_inputs
from ldm_jax.sampling.from_arguments import check_batch_size
from ldm_jax.sampling.recipe import (
    ConcatInput,
    Edit,
    Guidance,
    Recipe,
    Solving,
    check_side,
    default_recipe,
    is_conditional,
    solving_defaults,
    with_guidance,
    without_guide_model,
)

INTERPOLATED = 8  # default of --num with --to_prompt
CFGPP_SCALE = 0.6  # default of --guidance with --cfgpp
NOISE_LEVEL = 20  # default of an upscaler's --noise_level
REFINER_START = 0.8  # default of --refiner_start: SDXL's refiner is trained on the last fifth of the process


def recipe_from_flags(
    model: LatentDiffusion,
    values: FlagValues,
    labels: list[int],
    captions: tuple[list[str], list[int]] | None = None,
) -> Recipe:
    """The recipe of `command_line.define_sampling_flags`, and of the classes `labels` in turn ([] = none).

    `captions` are prompts, and the index of each sample's, for a text-to-image model without --prompt. Raises
    InputError for flags that do not fit the model, or each other.
    """
    by_prompt = bool(values.prompt or values.prompt_file)
    if captions and not by_prompt:
        prompts, labels = captions
    else:
        prompts = _prompts(model, values)
        if by_prompt and isinstance(model.conditioning, TextConditioning):
            labels = list(range(len(prompts)))
    check_batch_size("--batch_size", values.batch_size)
    num = len(prompts) if by_prompt and not values["num"].present else values.num
    recipe = default_recipe(model, num, values.seed, labels, prompts, values.sampler)
    guidance = _guidance(recipe.guidance, model, values, prompts)
    return with_guidance(model, recipe._replace(solving=_solving(model, values), guidance=guidance))


def _solving(model: LatentDiffusion, values: FlagValues) -> Solving:
    if values.threshold and model.first_stage.module is not None:
        raise InputError(f"--threshold={values.threshold} is for diffusion on pixels; latents have no bounds")
    solving = solving_defaults(model, _or(values.sampler, model.defaults.sampler), values.steps)
    if values.timesteps is not None:
        if values.steps or values.spacing:
            raise InputError("--timesteps lists the steps; leave out --steps and --spacing")
        try:
            timesteps = [int(word) for word in values.timesteps]
        except ValueError:
            words = ",".join(values.timesteps)
            raise InputError(f"--timesteps={words} must be whole numbers, e.g. 999,700,400") from None
        solving = solving._replace(steps=len(timesteps), spacing=timesteps)
    names = ("spacing", "eta", "churn", "variance", "threshold")
    return solving._replace(**{name: _or(values[name].value, getattr(solving, name)) for name in names})


def _guidance(defaults: Guidance, model: LatentDiffusion, values: FlagValues, prompts: list[str]) -> Guidance:
    conditional = is_conditional(model)
    if values.cfgpp and not conditional:
        raise InputError("--cfgpp needs a model with classes or texts; this one has none")
    others = (values.cfgpp, values.classifier, values.clip, values.negative_prompt is not None)
    if any((*others, _or(values.guidance, 1) < 1)):
        defaults = without_guide_model(defaults)
    guide_model = defaults.guide_model if values.guide_model is None else values.guide_model or None
    if not (conditional or guide_model):
        _check_unguided(values)
    scales = {"classifier_scale": "classifier", "clip_guidance_scale": "clip"}
    for scale, name in scales.items():
        if values[scale].value is not None and not values[name].value:
            raise InputError(f"--{scale} needs --{name}, a run folder with such a model")
    if values.guide_null and not (conditional and values.guide_model):
        raise InputError("--guide_null needs --guide_model, and a model with classes or texts")
    if values.clip and not prompts:
        raise InputError(f'--clip={values.clip} needs a text to guide to, e.g. --prompt="red cat"')
    return Guidance(
        scale=_or(values.guidance, CFGPP_SCALE if values.cfgpp else defaults.scale),
        interval=_or(values.guidance_interval, defaults.interval),
        rescale=_or(values.guidance_rescale, 0.0 if values.cfgpp else defaults.rescale),
        negative_prompt=values.negative_prompt,
        parallel=_or(values.guidance_parallel, defaults.parallel),
        max_norm=_or(values.guidance_max_norm, defaults.max_norm),
        guide_model=guide_model,
        guide_null=values.guide_null or (values.guide_model is None and defaults.guide_null),
        cfgpp=values.cfgpp,
        **{name: values[name].value or None for name in scales.values()},
        **{scale: _or(values[scale].value, 1.0 if values[name].value else 0.0) for scale, name in scales.items()},
    )


def _check_unguided(values: FlagValues) -> None:
    """Raises InputError for flags of guidance that have no effect without a condition and a weaker model."""
    off = {"guidance": 1, "guidance_rescale": 0, "guidance_parallel": 1, "guidance_max_norm": 0}
    if not (values.classifier or values.clip):
        off["guidance_interval"] = [0, 1]
    for flag, without in off.items():
        if values[flag].value not in (None, without):
            value = str(values[flag].value).strip("[]").replace(" ", "")
            raise InputError(f"--{flag}={value} needs a model with classes, or --guide_model; this one has none")


def _prompts(model: LatentDiffusion, values: FlagValues) -> list[str]:
    """The prompts of the flags; raises InputError for a model that takes none, or that needs one."""
    texts = isinstance(model.conditioning, TextConditioning)
    for flag in ("prompt", "prompt_file", "negative_prompt"):
        for_clip = values.clip and flag != "negative_prompt"
        if values[flag].value is not None and not texts and not for_clip:
            what = f"classes: {', '.join(model.class_names)}" if model.class_names else "nothing"
            raise InputError(f"--{flag} is for text-to-image models, or with --clip; this one is conditioned on {what}")
    if values.prompt and values.prompt_file:
        raise InputError("--prompt and --prompt_file both set the prompts; choose one")
    if values.prompt_file:
        return _lines(Path(values.prompt_file))
    if texts and not values.prompt:
        raise InputError('--prompt is missing; it must be a text, e.g. --prompt="a photo of a cat"')
    return list(values.prompt or [])


def _lines(path: Path) -> list[str]:
    """The prompts in a file, one a line."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"--prompt_file={path} cannot be read: {error.strerror}") from error
    except ValueError:
        raise InputError(f"--prompt_file={path} is not UTF-8 text") from None
    if not prompts:
        raise InputError(f"--prompt_file={path} has no prompts; it must have one in each line")
    return prompts


def with_edit_flags(recipe: Recipe, values: FlagValues, model: LatentDiffusion) -> Recipe:
    """The recipe with the flags of `command_line.define_editing_flags`; raises InputError for those that do not fit."""
    _check_pairs(recipe, values)
    has_concat_image = _has_concat_image(values, model)
    if model.concat and not has_concat_image and not recipe.concat.split:
        inpaints = "inpaints; it needs an image and a mask of what to sample: --init_image --mask"
        upscales = "upscales; it needs a low-resolution --concat_image"
        raise InputError(f"this model {inpaints if isinstance(model.concat, Inpainting) else upscales}")
    is_refiner = isinstance(model.conditioning, TextConditioning) and model.conditioning.time_ids == "aesthetic_score"
    if is_refiner and not (values.init_image or values.init_latents):
        advice = "add --init_image, or name it by --refiner with SDXL's base as --model"
        print(f"warning: --model is SDXL's refiner, trained on low noise levels alone; {advice}", file=sys.stderr)
    if values.vae_tiling and model.first_stage.module is None:
        raise InputError("--vae_tiling is for latent diffusion; this model has no autoencoder")
    split = None if has_concat_image else recipe.concat.split
    interpolates = values.to_prompt is not None and not values["num"].present
    size = _size(recipe, values, model, split)
    _print_cropped(values, model, size)
    if values.guide_model is None and (values.refiner or values.negative_label is not None):
        recipe = recipe._replace(guidance=without_guide_model(recipe.guidance))
    return recipe._replace(
        num=INTERPOLATED if interpolates else recipe.num,
        size=size,
        edit=_edit(values),
        concat=ConcatInput(values.concat_image or None, split, _noise_level(values.noise_level, model)),
        vae_tiling=bool(values.vae_tiling),
        refiner=values.refiner or None,
        refiner_start=_or(values.refiner_start, REFINER_START) if values.refiner else 1.0,
    )


def _check_pairs(recipe: Recipe, values: FlagValues) -> None:
    """Raises InputError for edit flags that need another one, or exclude each other."""
    needs = dict.fromkeys(("strength", "mask", "invert", "to_image", "outpaint"), "init_image")
    for flag, other in (needs | {"resample_jump": "resample", "refiner_start": "refiner"}).items():
        if _is_set(values, flag) and not _is_set(values, other):
            raise InputError(f"--{flag} needs --{other}")
    if values.to_prompt is not None and len(recipe.prompts) != 1:
        raise InputError(f"--to_prompt needs one --prompt to interpolate from; there are {len(recipe.prompts)}")
    if values.to_prompt is not None and recipe.labels != [0]:
        raise InputError("--to_prompt is for text-to-image models; this one is not conditioned on texts")
    if values.mask and values.outpaint:
        raise InputError("--mask and --outpaint both set the region to sample; choose one")
    if values.resample and not (values.mask or values.outpaint):
        raise InputError("--resample needs --mask or --outpaint")
    noises = [flag for flag in ("init_latents", "to_seed", "to_image", "invert") if _is_set(values, flag)]
    if len(noises) > 1:
        raise InputError(f"--{noises[0]} and --{noises[1]} both set the initial noise; choose one")
    for flag in ("strength", "mask", "outpaint"):
        if (values.invert or values.to_image) and _is_set(values, flag):
            raise InputError(f"--{flag} and --{'invert' if values.invert else 'to_image'} do not go together")


def _is_set(values: FlagValues, flag: str) -> bool:
    """Whether a flag has a value; 0 is one."""
    value = values[flag].value
    return value is not None and value is not False and value != ""


def _edit(values: FlagValues) -> Edit:
    strength = 1.0
    if values.init_image and not (values.invert or values.to_image):
        strength = _or(values.strength, 1.0 if values.mask or values.outpaint else 0.6)
    return Edit(
        strength=strength,
        resample=_or(values.resample, 1),
        resample_jump=_or(values.resample_jump, 1),
        invert=bool(values.invert),
        to_seed=values.to_seed,
        to_prompt=values.to_prompt,
        **{name: values[name].value or None for name in ("init_image", "mask", "outpaint", "to_image", "init_latents")},
    )


def _has_concat_image(values: FlagValues, model: LatentDiffusion) -> bool:
    """Whether the flags have an image for concat conditioning; raises InputError for one the model does not take."""
    inpaints = isinstance(model.concat, Inpainting)
    if values.concat_image and (model.concat is None or inpaints):
        takes = image_flags(model) if inpaints else "neither"
        raise InputError(f"--concat_image is for super-resolution and segmentation maps; this model takes {takes}")
    image = (values.mask or values.outpaint) if inpaints else values.concat_image
    if model.concat and values.init_image and not image:
        raise InputError(f"--init_image needs {'--mask' if inpaints else '--concat_image'} with this model")
    return bool(image)


def check_label(label: str, recipe: Recipe, model: LatentDiffusion) -> None:
    """Raises InputError for a class (--label) of samples whose concat conditioning is of a split's images."""
    if recipe.concat.split:
        classes = f"which have their own classes; add {image_flags(model)}"
        raise InputError(f"--label={label}: without an image this model restores test images, {classes}")


def image_flags(model: LatentDiffusion) -> str:
    """The flags of the image for a model's concat conditioning."""
    return "--init_image and --mask" if isinstance(model.concat, Inpainting) else "--concat_image"


def _size(recipe: Recipe, values: FlagValues, model: LatentDiffusion, split: str | None) -> list[int]:
    """Height and width: those of the flags, of an upscaler's image enlarged, for an image input, or of the model."""
    sides = {flag: values[flag].value for flag in ("height", "width") if values[flag].value is not None}
    factor, upscaler = model.size_multiple, model.concat is not None and model.concat.noise is not None
    for flag, side in sides.items():
        if upscaler:
            raise InputError(f"--{flag}={side}: the images are {factor} times as large as --concat_image; leave it out")
        if split:
            add = f"at their own size; add {image_flags(model)}"
            raise InputError(f"--{flag}={side}: without an image this model restores test images, {add}")
        check_side(f"--{flag}", side, model)
    if upscaler and values.concat_image:
        small = image_inputs.open_image(Path(values.concat_image), "--concat_image")
        return [factor * small.height, factor * small.width]
    if not sides and (values.init_image or values.concat_image) and model.defaults.crop == "center":
        return _size_of_image(recipe, values, model)
    return [sides.get(flag, side) for flag, side in zip(("height", "width"), recipe.size)]


def _size_of_image(recipe: Recipe, values: FlagValues, model: LatentDiffusion) -> list[int]:
    """Height and width for an initial image, or one of concat conditioning (see `image_inputs.size_like`)."""
    flag = "concat_image" if values.concat_image else "init_image"
    image = image_inputs.open_image(Path(values[flag].value), f"--{flag}")
    enlarged = model.concat.factor if isinstance(model.concat, LowResolution) else 1
    multiple = math.lcm(model.size_multiple, enlarged)
    height, width = image_inputs.size_like((enlarged * image.height, enlarged * image.width), recipe.size, multiple)
    if [height, width] != recipe.size:
        choose = "--width and --height choose another size"
        print(f"--{flag} is {image.width}x{image.height}: the samples are {width}x{height}; {choose}")
    return [height, width]


def _print_cropped(values: FlagValues, model: LatentDiffusion, size: list[int]) -> None:
    """Prints a line for each image whose proportions are not those of the samples: it is cropped, or squeezed."""
    for flag in ("init_image", "to_image"):
        if not values[flag].value:
            continue
        image = image_inputs.open_image(Path(values[flag].value), f"--{flag}")
        kept = image_inputs.cropped_size((image.height, image.width), tuple(size))
        if kept is not None:
            center = f"only its central {kept[1]}x{kept[0]} is used"
            what = center if model.defaults.crop == "center" else "it is squeezed"
            why = "the samples" if flag == "init_image" else "--init_image and the samples"
            warn(f"note: --{flag} is {image.width}x{image.height}: {what}, as {why} are {size[1]}x{size[0]}")


def _noise_level(level: int | None, model: LatentDiffusion) -> int | None:
    noise = model.concat.noise if model.concat else None
    if noise is None and level is not None:
        raise InputError(f"--noise_level={level} is for upscalers of Stable Diffusion; this model is none")
    level = None if noise is None else _or(level, NOISE_LEVEL)
    if noise is not None and level > noise.max_noise_level:
        raise InputError(f"--noise_level={level} must be from 0 to {noise.max_noise_level} for this model")
    return level


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
