"""The recipe of Python arguments, with the model's sampling defaults for those left out."""

import unicodedata
from collections.abc import Sequence

import jax
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.recipe import Recipe, default_recipe, solving_defaults, with_guidance, without_guide_model


def recipe_from_arguments(
    model: LatentDiffusion,
    *,
    labels: Sequence[int | str] | None = None,
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
      labels: classes, by index or name, in turn; None: all.
      prompts: of a text-to-image model, in turn.
      negative_prompt: in place of the null condition.
      num: of samples; None: one for each label or prompt.
      seed: sample k depends on (seed, k, its condition) alone.
      sampler, steps, guidance: None: the model's defaults.
      size: (height, width) in pixels; None: the model's.

    Raises:
      InputError: an argument that the model does not take, or a missing one.
    """
    if model.concat:
        raise InputError("the model has concat conditioning: pass its image to `python -m ldm_jax.sample`")
    texts = isinstance(model.conditioning, TextConditioning)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if texts != bool(prompts):
        needs = "prompts, which are missing" if texts else "labels; prompts are for text-to-image models"
        raise InputError(f"the model takes {needs}")
    labels = list(range(len(prompts))) if texts else label_indices("labels", labels, model.class_names)
    recipe = default_recipe(model, num or len(labels) or 1, seed, labels, prompts, sampler)
    own = recipe.guidance
    if negative_prompt is not None or (guidance is not None and guidance < 1):
        own = without_guide_model(own)
    scale = own.scale if guidance is None else guidance
    if not (np.isfinite(scale) and scale >= 0):
        raise InputError(f"guidance is {scale}; it must be a finite number, 0 or more")
    recipe = recipe._replace(
        size=list(size or recipe.size),
        solving=solving_defaults(model, recipe.solving.sampler, steps),
        guidance=own._replace(scale=scale, negative_prompt=negative_prompt),
    )
    return with_guidance(model, recipe)


def check_batch_size(name: str, batch_size: int | None) -> None:
    """Raises InputError, which names the flag or argument, for a batch size that does not divide over the devices."""
    devices = jax.local_device_count()
    if batch_size is not None and batch_size % devices:
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
