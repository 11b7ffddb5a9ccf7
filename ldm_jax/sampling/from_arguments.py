"""The recipe of Python arguments, with the model's sampling defaults for those left out."""

from collections.abc import Sequence

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.recipe import Recipe, default_recipe, solving_defaults, with_guidance


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
    scale = own.scale if guidance is None else guidance
    if not (np.isfinite(scale) and scale >= 0):
        raise InputError(f"guidance is {scale}; it must be a finite number, 0 or more")
    recipe = recipe._replace(
        size=list(size or recipe.size),
        solving=solving_defaults(model, recipe.solving.sampler, steps),
        guidance=own._replace(scale=scale, negative_prompt=negative_prompt),
    )
    return with_guidance(model, recipe)


def label_indices(name: str, labels: Sequence[int | str] | None, class_names: tuple[str, ...]) -> list[int]:
    """The indices of classes by index or name; of None, all. Raises InputError, which names the flag or argument."""
    if labels is None:
        return list(range(len(class_names)))
    words = [str(label).strip() for label in labels or [""]]
    if not class_names:
        raise InputError(f"{name}={','.join(words)}: the model has no classes")
    names, indices = [each.lower() for each in class_names], []
    for word in words:
        if word.lower() in names:
            indices.append(names.index(word.lower()))
        elif word.isdigit() and int(word) < len(names):
            indices.append(int(word))
        else:
            known = ", ".join(f"{i} {each}" for i, each in enumerate(class_names))
            raise InputError(f"{name}={word} is no class; the model has {known}")
    return indices
