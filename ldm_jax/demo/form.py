"""The form of the page: what of it a model has, its bounds, and the recipe of its values. Free of gradio."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image

from ldm_jax import command_line
from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import Inpainting
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion, Solver
from ldm_jax.sampling.from_arguments import label_indices
from ldm_jax.sampling.from_flags import check_label, recipe_from_flags, with_edit_flags
from ldm_jax.sampling.recipe import Recipe, default_recipe, is_conditional

ALL_CLASSES = "all classes, in turn"
MAX_STEPS = 250
MAX_GUIDANCE = 30.0
MAX_LORA_SCALE = 4.0
LABELS = {"prompt": "Prompt", "negative_prompt": "Negative prompt", "label": "Class", "sampler": "Sampler",
          "steps": "Steps", "guidance": "Guidance", "seed": "Seed", "num": "Images", "height": "Height",
          "width": "Width", "init_image": "Image", "concat_image": "Image", "mask": "Painted part",
          "strength": "Strength", "lora": "LoRA", "lora_scale": "LoRA scale"}  # fmt: skip


class Form(NamedTuple):
    """The values of the form as a browser sends them: unchecked, and None or "" where a field is empty or not there."""

    prompt: str | None = None  # prompts, one a line
    negative_prompt: str | None = None
    label: str | None = None  # one of `class_choices`, or ALL_CLASSES
    sampler: str | None = None
    steps: float | None = None
    guidance: float | None = None
    seed: float | None = 0
    num: float | None = 1
    height: float | None = None
    width: float | None = None
    strength: float | None = None
    lora: str | None = None  # file
    lora_scale: float | None = 1.0
    image: str | None = None  # file
    mask: str | None = None  # file: white = painted


class Bounds(NamedTuple):
    """The largest values of the form; the smallest are 1 or 0."""

    size: int  # of a side in pixels
    num: int
    steps: int = MAX_STEPS


class Controls(NamedTuple):
    """The fields of the form that a model has, with their choices."""

    texts: bool
    class_names: tuple[str, ...]
    samplers: tuple[str, ...]
    image: str  # the flag of its image: init_image or concat_image
    needs_image: bool
    paint: bool  # whether a part of the image can be painted, to sample that alone
    strength: bool
    guided: bool  # whether there is classifier-free guidance or autoguidance
    size_step: int  # a side is a multiple of it; 0: the size follows from the image


def controls_of(model: LatentDiffusion) -> Controls:
    """The fields of the form for a model."""
    inpaints, concat = isinstance(model.concat, Inpainting), model.concat is not None
    upscales = concat and model.concat.noise is not None
    factor = getattr(model.concat, "factor", 1) if concat and not inpaints else 1
    restores = model.defaults.concat_split is not None
    return Controls(
        texts=isinstance(model.conditioning, TextConditioning),
        class_names=tuple(model.class_names),
        samplers=tuple(name for name, solver in model.defaults.solvers.items() if isinstance(solver, Solver)),
        image="init_image" if inpaints or not concat else "concat_image",
        needs_image=concat and not restores,
        paint=inpaints or not concat,
        strength=not concat,
        guided=is_conditional(model) or default_recipe(model, 1, 0, [], []).guidance.guide_model is not None,
        size_step=0 if upscales else math.lcm(model.size_multiple, factor),
    )


def class_choices(class_names: Sequence[str]) -> dict[str, int]:
    """The texts by which a class is chosen, with its index: its name, and its number too if several have that name."""
    names = Counter([ALL_CLASSES, *class_names])
    return {name if names[name] == 1 else f"{name} ({index})": index for index, name in enumerate(class_names)}


def bounds_of(model: LatentDiffusion, max_size: int | None, max_num: int) -> Bounds:
    """The bounds of a model's form; `max_size` None is twice its own size. Raises InputError if it exceeds that."""
    own = max(model.image_shape[:2])
    if max_size is not None and max_size < own:
        raise InputError(f"--max_size={max_size} is less than the size of the model's images, {own}")
    return Bounds(max_size or 2 * own, max_num, min(MAX_STEPS, len(model.process)))


def recipe_of(model: LatentDiffusion, form: Form, bounds: Bounds) -> Recipe:
    """The recipe of a form's values; raises InputError, in the words of the page, for the first one that is wrong."""
    try:
        return _recipe(model, form, bounds)
    except InputError as error:
        raise InputError(in_words(str(error), form)) from error


def in_words(message: str, form: Form) -> str:
    """An error message with the page's labels for the flags' names, and without the folders of uploaded files."""
    for file in (form.image, form.mask, form.lora):
        message = message.replace(file, Path(file).name) if file else message
    pattern = rf"--({'|'.join(sorted(LABELS, key=len, reverse=True))})\b(=?)"
    return re.sub(pattern, lambda found: LABELS[found[1]] + (": " if found[2] else ""), message)


def _recipe(model: LatentDiffusion, form: Form, bounds: Bounds) -> Recipe:
    controls, values = controls_of(model), flags.FlagValues()
    command_line.define_sampling_flags(values, num=1)
    command_line.define_editing_flags(values)
    command_line.parse(values, ["demo", *_arguments(model, controls, form, bounds)])
    chosen = None if form.label in (None, "", ALL_CLASSES) else [form.label]
    index = class_choices(controls.class_names).get(form.label)
    labels = label_indices("--label", chosen if index is None else [index], controls.class_names)
    recipe = with_edit_flags(recipe_from_flags(model, values, labels), values, model)
    if chosen is not None:
        check_label(form.label, recipe, model)
    if max(recipe.size) > bounds.size:
        height, width = recipe.size
        raise InputError(f"the samples would be {width}x{height}; here a side has at most {bounds.size} pixels")
    return recipe


def _arguments(model: LatentDiffusion, controls: Controls, form: Form, bounds: Bounds) -> list[str]:
    """The flags of `ldm_jax.sample` that a form's values are; raises InputError for a value out of bounds."""
    prompts = [line.strip() for line in (form.prompt or "").splitlines() if line.strip()] if controls.texts else []
    if controls.texts and not prompts:
        raise InputError("the prompt is empty; it must be a text, e.g. a photo of a cat")
    if form.sampler not in controls.samplers:
        raise InputError(f"there is no sampler {form.sampler!r}; the model has {', '.join(controls.samplers)}")
    num = max(_whole("Images", form.num, 1, bounds.num), len(prompts))
    if num > bounds.num:
        raise InputError(f"there are {num} prompts, one a line; here are at most {bounds.num} images")
    chosen = {
        "num": num,
        "seed": _whole("Seed", form.seed, 0, 2**32 - 1),
        "sampler": form.sampler,
        "steps": _whole("Steps", form.steps, 1, bounds.steps),
    }
    if controls.guided:
        chosen["guidance"] = _number("Guidance", form.guidance, 0, MAX_GUIDANCE)
    if form.negative_prompt and controls.texts:
        chosen["negative_prompt"] = form.negative_prompt
    return [f"--prompt={prompt}" for prompt in prompts] + [
        f"--{name}={value}"
        for name, value in (chosen | _size(model, controls, form, bounds) | _image(controls, form)).items()
    ]


def _size(model: LatentDiffusion, controls: Controls, form: Form, bounds: Bounds) -> dict[str, int]:
    """The sides that are not the model's own: those are left out, so that an image keeps its proportions."""
    if not controls.size_step or form.height is None or form.width is None:
        return {}
    sides = {name: _whole(LABELS[name], getattr(form, name), 1, bounds.size) for name in ("height", "width")}
    return {} if tuple(sides.values()) == tuple(model.image_shape[:2]) else sides


def _image(controls: Controls, form: Form) -> dict[str, str | float]:
    if form.mask and not form.image:
        raise InputError("there is paint, but no image below it; add an image")
    if not form.image:
        if controls.needs_image:
            raise InputError(
                f"this model needs an image{', and paint on the part to sample' if controls.paint else ''}"
            )
        return {}
    if controls.needs_image and controls.paint and not form.mask:
        raise InputError("this model needs paint on the part of the image to sample")
    chosen = {controls.image: form.image}
    if controls.paint and form.mask:
        chosen["mask"] = form.mask
    if controls.strength:
        chosen["strength"] = _number("Strength", form.strength, 0.01, 1)
    return chosen


def lora_of(form: Form) -> tuple[str, float] | None:
    """The LoRA file of a form and its scale, None if there is none; raises InputError for a scale out of bounds."""
    scale = _number(LABELS["lora_scale"], form.lora_scale, -MAX_LORA_SCALE, MAX_LORA_SCALE) if form.lora else 0.0
    return (form.lora, scale) if form.lora and scale else None


def _number(name: str, value: float | None, low: float, high: float, number_type: str = "number") -> float:
    """The value as a number within bounds; raises InputError, which names the field."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high or (number_type != "number" and number != int(number)):
        text, most = "empty" if value in (None, "") else value, f"{high:g}" if number_type == "number" else high
        raise InputError(f"{name} is {text}; it must be a {number_type} from {low:g} to {most}")
    return number


def _whole(name: str, value: float | None, low: int, high: int) -> int:
    return int(_number(name, value, low, high, "whole number"))


def save_edit(folder: Path, image: Image.Image | None, layers: list[Image.Image]) -> dict[str, str]:
    """Writes an uploaded image and, if any of it is painted, the mask to a folder; the files, as fields of `Form`."""
    painted = [layer for layer in layers if layer is not None and np.asarray(layer.convert("RGBA"))[..., 3].any()]
    files = {}
    if image is not None:
        if image.mode == "RGBA" and image.getextrema()[3] == (255, 255):
            image = image.convert("RGB")
        files["image"] = str(folder / "init_image.png")
        image.save(files["image"])
    if painted:
        alpha = np.max([np.asarray(layer.convert("RGBA"))[..., 3] for layer in painted], axis=0)
        files["mask"] = str(folder / "mask.png")
        Image.fromarray(np.where(alpha >= 128, 255, 0).astype(np.uint8)).save(files["mask"])
    return files
