"""The recipe of Python arguments, with the model's sampling defaults for those left out."""

import math
import unicodedata
from collections.abc import Sequence

import jax
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.recipe import (
    LAST_SEED,
    Guidance,
    Recipe,
    check_side,
    default_recipe,
    is_conditional,
    solving_defaults,
    with_guidance,
    without_guide_model,
)


def recipe_from_arguments(
    model: LatentDiffusion,
    *,
    labels: Sequence[int | str] | int | str | None = None,
    prompts: Sequence[str] | str = (),
    negative_prompt: str | None = None,
    num: int | None = None,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
) -> Recipe:
    """The recipe of samples from noise.

    Args:
      model: without concat conditioning, which needs an image.
      labels: classes, by index or name, in turn, also as one text with commas; None: all.
      prompts: of a text-to-image model, in turn.
      negative_prompt: of a text-to-image model, in place of the null condition.
      num: of samples; None: one for each label or prompt.
      seed: from 0 to 2^32 - 1; sample k depends on (seed, k, its condition) alone.
      sampler, steps, guidance: None: the model's defaults.
      size: (height, width) in pixels; None: the model's.

    Raises:
      InputError: an argument that the model does not take, or a missing one, or a value that is out of range.
    """
    if model.concat:
        raise InputError("the model has concat conditioning: pass its image to `python -m ldm_jax.sample`")
    prompts, labels = _conditions(model, labels, prompts, negative_prompt)
    num = whole_number("num", max(len(labels), 1) if num is None else num, 1)
    seed = whole_number("seed", seed, 0, LAST_SEED)
    steps = None if steps is None else whole_number("steps", steps, 1)
    recipe = default_recipe(model, num, seed, labels, prompts, sampler)
    recipe = recipe._replace(
        size=recipe.size if size is None else _size(model, size),
        solving=solving_defaults(model, recipe.solving.sampler, steps),
        guidance=_guidance(model, recipe.guidance, guidance, negative_prompt),
    )
    return with_guidance(model, recipe)


def _conditions(
    model: LatentDiffusion,
    labels: Sequence[int | str] | int | str | None,
    prompts: Sequence[str] | str,
    negative_prompt: str | None,
) -> tuple[list[str], list[int]]:
    """The prompts, and the classes or the indices of the prompts; raises InputError for those of another model."""
    texts = isinstance(model.conditioning, TextConditioning)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if texts != bool(prompts):
        needs = "prompts, which are missing" if texts else "labels; prompts are for text-to-image models"
        raise InputError(f"the model takes {needs}")
    for name, some in (("prompts", prompts), ("negative_prompt", [negative_prompt or ""])):
        if wrong := [text for text in some if not isinstance(text, str)]:
            raise InputError(f"{name} has {wrong[0]!r}; a prompt must be a text")
    if texts:
        if labels is not None:
            raise InputError(f"labels={labels!r} are of a model with classes; this one takes prompts")
        return prompts, list(range(len(prompts)))
    if negative_prompt is not None:
        raise InputError(f"negative_prompt={negative_prompt!r} is for text-to-image models")
    if labels is not None and not np.ndim(labels):
        labels = labels.split(",") if isinstance(labels, str) else [labels]
    return prompts, label_indices("labels", labels, model.class_names)


def _guidance(model: LatentDiffusion, defaults: Guidance, scale: float | None, negative_prompt: str | None) -> Guidance:
    """The guidance of arguments; raises InputError for a scale out of range, or that has no effect on the model."""
    number = _number("guidance", defaults.scale if scale is None else scale)
    if negative_prompt is not None or (scale is not None and number < 1):
        defaults = without_guide_model(defaults)
    if scale not in (None, 1) and not (is_conditional(model) or defaults.guide_model):
        raise InputError(f"guidance={scale} needs a model with classes or texts; this one has none")
    return defaults._replace(scale=number, negative_prompt=negative_prompt)


def _number(name: str, value: float) -> float:
    """A finite number of 0 or more; raises InputError, which names the argument, for another value."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise InputError(f"{name} is {value!r}; it must be a finite number, 0 or more")
    return number


def _size(model: LatentDiffusion, size: Sequence[int]) -> list[int]:
    if np.shape(size) != (2,):
        raise InputError(f"size is {size!r}; it must be (height, width) in pixels")
    sides = [whole_number(name, side, 1) for name, side in zip(("height", "width"), size)]
    for name, side in zip(("height", "width"), sides):
        check_side(name, side, model)
    return sides


def whole_number(name: str, value: int, lowest: int, highest: int | None = None) -> int:
    """A whole number in a range; raises InputError, which names the flag or argument, for another value."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < lowest or (highest is not None and value > highest):
        numbers = f"{lowest} or more" if highest is None else f"from {lowest} to {highest}"
        raise InputError(f"{name} is {value!r}; it must be a whole number, {numbers}")
    return int(value)


def check_batch_size(name: str, batch_size: int | None) -> None:
    """Raises InputError, which names the flag or argument, unless a batch size is None or divides over the devices."""
    devices = jax.local_device_count()
    if batch_size is not None and whole_number(name, batch_size, 1) % devices:
        wrong = f"{name}={batch_size} does not divide over {devices} devices"
        raise InputError(f"{wrong}; it must be a multiple of {devices}")


def label_indices(name: str, labels: Sequence[int | str] | None, class_names: tuple[str, ...]) -> list[int]:
    """The indices of classes by index or name; of None, all.

    A text is a name before it is an index, if a class is called "1": exactly as it is written, else in any case and
    Unicode normalization. Texts in turn, such as those of a flag split at its commas, may be one name with commas.
    Raises InputError, which names the flag or argument, for an unknown class and for a name of several.
    """
    if labels is None:
        return list(range(len(class_names)))
    words = [
        label if isinstance(label, int | np.integer) else str(label).strip()
        for label in (labels if len(labels) else [""])
    ]
    if not class_names:
        raise InputError(f"{name}={','.join(map(str, words))}: the model has no classes")
    by_name: dict[str, list[int]] = {}
    for index, each in enumerate(class_names):
        for spelling in {f"={each}", _any_case(each)}:
            by_name.setdefault(spelling, []).append(index)
    longest, indices = 1 + max(each.count(",") for each in class_names), []
    while words:
        for length in range(min(longest, len(words)), 0, -1):
            if matches := _classes(words[:length], by_name, len(class_names)):
                break
        argument = f"{name}={','.join(map(str, words[:length]))}"
        if not matches:
            known = ", ".join(f"{i} {each}" for i, each in enumerate(class_names))
            raise InputError(f"{argument} is no class; the model has {known}")
        if len(matches) > 1:
            several = ", ".join(f"{i} {class_names[i]}" for i in matches)
            raise InputError(
                f"{argument} is the name of several classes; choose by the exact name or number: {several}"
            )
        indices += matches
        words = words[length:]
    return indices


def _classes(words: list[int | str], by_name: dict[str, list[int]], num: int) -> list[int]:
    """The indices of the classes that one word, or several with commas between them, may mean."""
    word = ",".join(map(str, words))
    if not any(isinstance(each, int | np.integer) for each in words):
        for spelling in (f"={word}", _any_case(word)):
            if spelling in by_name:
                return by_name[spelling]
    return [int(word)] if word.isdecimal() and int(word) < num else []


def _any_case(name: str) -> str:
    """A name without the differences of case, Unicode normalization and spaces after commas."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return ",".join(part.strip() for part in folded.split(","))
