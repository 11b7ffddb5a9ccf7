"""What a command line asks of a trained model: flags to a recipe, with what they leave out."""

from pathlib import Path
from typing import Any

import jax
from absl.flags import FlagValues

from ldm_jax.errors import InputError
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline.model import Trained
from ldm_jax.pipeline.upscaler import NOISE_LEVEL
from ldm_jax.sampling import image_inputs, tables
from ldm_jax.sampling.recipe import Recipe, map_split

BETWEEN = 8  # pictures from one prompt to another, unless one says how many
# What a model with a map condition must be given, if it knows no data set to take it from.
GIVEN = {
    "inpainting": "inpaints; it must be given a picture and what to draw of it: --init_image --mask",
    "low_resolution": "enlarges; it must be given a small picture: --map",
}


def from_flags(
    model: Trained, values: FlagValues, labels: list[int], captions: tuple[list[str], list[int]] | None = None
) -> Recipe:
    """What a command line asks for (see `command_line.define_drawing_flags`); what it leaves out is as in the config.

    `captions` are what a model of texts draws by if no prompt is given: texts, and which of them each picture has.

    Raises:
      InputError: guidance for a model without classes, a batch that does not divide over the devices, or timesteps
        that are no numbers.
    """
    sampling, devices = model.config.sampling, jax.local_device_count()
    given = bool(values.prompt or values.prompt_file)
    prompts, labels = captions if captions and not given else (_prompts(model, values), labels)
    if values.guidance not in (None, 1.0) and not (model.class_names or _told_texts(model)):
        raise InputError(f"--guidance={values.guidance} needs a model with classes; this one has none")
    if values.batch_size and values.batch_size % devices:
        raise InputError(f"--batch_size={values.batch_size} does not divide over {devices} devices")
    if values.threshold and model.config.autoencoder.kind != "none":
        raise InputError(
            f"--threshold={values.threshold} is for models of pixels; the latents of this one know no bounds"
        )
    if values.classifier_scale is not None and not values.classifier:
        raise InputError("--classifier_scale needs --classifier, a run folder with a classifier")
    if values.clip_scale is not None and not values.clip:
        raise InputError("--clip_scale needs --clip, a run folder with a CLIP")
    if values.clip and not prompts:
        raise InputError(f'--clip={values.clip} needs a text to guide towards, e.g. --prompt="red cat"')
    sampler = _or(values.sampler, sampling.sampler)
    defaults = tables.defaults_of(model, sampler)
    spacing = _or(values.spacing, defaults["spacing"])
    if values.timesteps is not None:
        if values.steps or values.spacing:
            raise InputError("--timesteps says it all; leave out --steps and --spacing")
        spacing = _whole_numbers("--timesteps", values.timesteps)
    return Recipe(
        num=len(prompts) if given and not values["num"].present else values.num,
        labels=list(range(len(prompts))) if given and _told_texts(model) else labels,
        prompts=prompts,
        seed=values.seed,
        guidance=_or(values.guidance, sampling.guidance),
        guidance_interval=_or(values.guidance_interval, list(sampling.guidance_interval)),
        guidance_rescale=_or(values.guidance_rescale, sampling.guidance_rescale),
        threshold=_or(values.threshold, sampling.threshold),
        sampler=sampler,
        steps=len(spacing) if isinstance(spacing, list) else _or(values.steps, sampling.steps),
        spacing=spacing,
        eta=_or(values.eta, defaults["eta"]),
        churn=_or(values.churn, defaults["churn"]),
        classifier=values.classifier or "",
        classifier_scale=_or(values.classifier_scale, 1.0 if values.classifier else 0.0),
        clip=values.clip or "",
        clip_scale=_or(values.clip_scale, 1.0 if values.clip else 0.0),
        variance=_or(values.variance, defaults["variance"]),
        dtype=model.config.dtype,
        size=list(pipeline_from_config.picture_size(model.config)),
        negative_prompt=values.negative_prompt,
        map_split=map_split(model),
    )


def _prompts(model: Trained, values: FlagValues) -> list[str]:
    """The prompts of a command line; raises InputError for a model that wants none, or lacks one."""
    texts = _told_texts(model)
    for flag in ("prompt", "prompt_file", "negative_prompt"):
        guides = values.clip and flag != "negative_prompt"
        if values[flag].value is not None and not texts and not guides:
            raise InputError(f"--{flag} is for models of texts, or with --clip; this one draws {_what_it_draws(model)}")
    if values.prompt and values.prompt_file:
        raise InputError("--prompt and --prompt_file both say what to draw; choose one")
    if values.prompt_file:
        return _lines(Path(values.prompt_file))
    if texts and not values.prompt:
        raise InputError('--prompt is missing; it must be a text to draw, e.g. --prompt="a photo of a cat"')
    return list(values.prompt or [])


def _told_texts(model: Trained) -> bool:
    return bool(model.pretrained and model.pretrained.encoders)


def _lines(path: Path) -> list[str]:
    """The prompts in a file; raises InputError if it cannot be read, or has none."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"--prompt_file={path} cannot be read: {error.strerror}") from error
    except ValueError:
        raise InputError(f"--prompt_file={path} is not UTF-8 text") from None
    if not prompts:
        raise InputError(f"--prompt_file={path} has no prompts; it must have one in each line")
    return prompts


def _what_it_draws(model: Trained) -> str:
    return f"classes: {', '.join(model.class_names)}" if model.class_names else "without being told anything"


def with_edits(recipe: Recipe, values: FlagValues, kind: str) -> Recipe:
    """The recipe with what the flags of `command_line.define_editing_flags` ask for; `kind` is of the model's map.

    Raises:
      InputError: flags that do not go together, or not with the model.
    """
    needs = {"strength": "init_image", "mask": "init_image", "invert": "init_image", "to_image": "init_image",
             "outpaint": "init_image", "resample_jump": "resample"}  # fmt: skip
    for flag, other in needs.items():
        if values[flag].value and not values[other].value:
            raise InputError(f"--{flag} needs --{other}")
    if values.to_prompt is not None and len(recipe.prompts) != 1:
        raise InputError(f"--to_prompt needs one --prompt to lead from; there are {len(recipe.prompts)}")
    if values.to_prompt is not None and recipe.labels != [0]:
        raise InputError("--to_prompt is for models of texts; this one is told none")
    if values.mask and values.outpaint:
        raise InputError("--mask and --outpaint both say what to draw; choose one")
    masked = values.mask or values.outpaint
    if values.resample and not masked:
        raise InputError("--resample needs --mask or --outpaint")
    noises = [n for n in ("init_latents", "to_seed", "to_image", "invert") if values[n].value not in (None, False)]
    if len(noises) > 1:
        raise InputError(f"--{noises[0]} and --{noises[1]} both say what noise to begin from; choose one")
    given = _is_given_a_map(values, kind)
    if kind != "none" and not given and not recipe.map_split:
        raise InputError(f"this model {GIVEN[kind]}")
    own_noise = values.invert or values.to_image
    for flag in ("strength", "mask", "outpaint"):
        if own_noise and values[flag].value:
            raise InputError(f"--{flag} and --{'invert' if values.invert else 'to_image'} do not go together")
    strength = 1.0
    if values.init_image and not own_noise:
        strength = _or(values.strength, 1.0 if masked else 0.6)
    return recipe._replace(
        init_image=values.init_image or "",
        strength=strength,
        mask=values.mask or "",
        outpaint=values.outpaint or "",
        resample=_or(values.resample, 1),
        resample_jump=_or(values.resample_jump, 1),
        num=BETWEEN if values.to_prompt is not None and not values["num"].present else recipe.num,
        to_prompt=_or(values.to_prompt, ""),
        to_seed=_or(values.to_seed, -1),
        to_image=values.to_image or "",
        invert=bool(values.invert),
        init_latents=values.init_latents or "",
        map=values.map or "",
        map_split="" if given else recipe.map_split,
    )


def with_pretrained(recipe: Recipe, values: FlagValues, model: Trained) -> Recipe:
    """The recipe with what is asked of diffusers models alone: --height and --width, --vae_tiling, --noise_level.

    Raises:
      InputError: for a model that does not take them, or a size that the autoencoder cannot halve.
    """
    if values.vae_tiling and not (model.pretrained and model.config.autoencoder.kind == "kl"):
        raise InputError("--vae_tiling is for diffusers models with an AutoencoderKL; this model has none")
    return recipe._replace(
        size=_size(recipe, values, model),
        vae_tiling=bool(values.vae_tiling),
        noise_level=_noise_level(values.noise_level, model),
    )


def _size(recipe: Recipe, values: FlagValues, model: Trained) -> list[int]:
    """Height and width: the model's own unless they are given, or a multiple of those of the picture to enlarge."""
    asked = {flag: values[flag].value for flag in ("height", "width") if values[flag].value is not None}
    factor = pipeline_from_config.downsampling(model.config)
    for flag, side in asked.items():
        if not model.pretrained:
            raise InputError(
                f"--{flag}={side} is for diffusers models; this run draws {'x'.join(map(str, recipe.size))}"
            )
        if model.pretrained.upscaling:
            raise InputError(
                f"--{flag}={side}: what this model draws is {factor} times as large as --map; leave it out"
            )
        if recipe.map_split:
            raise InputError(
                f"--{flag}={side}: without a picture of yours this run restores test pictures, of its own size; give "
                "--init_image and --mask"
            )
        if side % factor:
            raise InputError(
                f"--{flag}={side} must be a multiple of {factor}, as a latent of this autoencoder is "
                f"{factor}x{factor} pixels; next to it is {max(side // factor, 1) * factor}"
            )
    if model.pretrained and model.pretrained.upscaling and recipe.map:
        small = image_inputs.read_picture(Path(recipe.map), "--map")
        return [factor * small.height, factor * small.width]
    return [asked.get(flag, side) for flag, side in zip(("height", "width"), recipe.size)]


def _noise_level(asked: int | None, model: Trained) -> int:
    upscaling = model.pretrained.upscaling if model.pretrained else None
    if upscaling is None:
        if asked is not None:
            raise InputError(f"--noise_level={asked} is for diffusers' upscalers; this model is none")
        return -1
    level = _or(asked, NOISE_LEVEL)
    if level > upscaling.max_noise_level:
        raise InputError(f"--noise_level={level} must be from 0 to {upscaling.max_noise_level} for this model")
    return level


def _is_given_a_map(values: FlagValues, kind: str) -> bool:
    """Whether the flags say what the model's map is; raises InputError for a map that it does not take, or lacks."""
    if values.map and kind in ("none", "inpainting"):
        takes = "no map" if kind == "none" else "--init_image and --mask"
        raise InputError(f"--map={values.map} is for models of super-resolution or segments; this one takes {takes}")
    given = (values.mask or values.outpaint) if kind == "inpainting" else values.map
    if kind != "none" and values.init_image and not given:
        raise InputError(f"--init_image needs {'--mask' if kind == 'inpainting' else '--map'} with this model")
    return bool(given)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _whole_numbers(flag: str, words: list[str]) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        raise InputError(f"{flag}={','.join(words)} must be whole numbers, e.g. 999,700,400") from None
