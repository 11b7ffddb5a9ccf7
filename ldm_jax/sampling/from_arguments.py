"""From Python arguments to a recipe, with the model's defaults where one is left out."""

from collections.abc import Sequence

from ldm_jax.errors import InputError
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.from_flags import solving_defaults
from ldm_jax.sampling.recipe import Guidance, Recipe


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
      labels: classes, by number or name, in turn; None: all.
      prompts: of a text-to-image model, in turn.
      negative_prompt: in place of the null condition.
      num: of samples; None: one for each label or prompt.
      seed: sample k depends on (seed, k, its condition) alone.
      sampler, steps, guidance: None: the model's own.
      size: (height, width) in pixels; None: the model's own.

    Raises:
      InputError: an argument that the model does not take, or that it lacks.
    """
    if model.concat:
        raise InputError("the model needs an image to sample from: give one to `python -m ldm_jax.sample`")
    texts = isinstance(model.conditioning, TextConditioning)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if texts != bool(prompts):
        raise InputError(f"prompts are for text-to-image models; this one {'lacks them' if texts else 'takes labels'}")
    numbers = list(range(len(prompts))) if texts else label_numbers("labels", labels, model.class_names)
    defaults = model.defaults
    return Recipe(
        num=num or len(numbers) or 1,
        seed=seed,
        labels=numbers,
        prompts=prompts,
        size=list(size or model.image_shape[:2]),
        dtype=model.dtype,
        solving=solving_defaults(model, sampler or defaults.sampler, steps),
        guidance=Guidance(
            scale=defaults.guidance if guidance is None else guidance,
            interval=list(defaults.guidance_interval),
            rescale=defaults.guidance_rescale,
            negative_prompt=negative_prompt,
        ),
    )


def label_numbers(name: str, labels: Sequence[int | str] | None, class_names: tuple[str, ...]) -> list[int]:
    """The numbers of classes given by number or name; of None, all.

    Raises:
      InputError: there is no such class; the line names the argument or flag `name`.
    """
    if labels is None:
        return list(range(len(class_names)))
    words = [str(label).strip() for label in labels or [""]]
    if not class_names:
        raise InputError(f"{name}={','.join(words)}: the model has no classes")
    lower, numbers = [each.lower() for each in class_names], []
    for word in words:
        if word.lower() in lower:
            numbers.append(lower.index(word.lower()))
        elif word.isdigit() and int(word) < len(class_names):
            numbers.append(int(word))
        else:
            known = ", ".join(f"{number} {each}" for number, each in enumerate(class_names))
            raise InputError(f"{name}={word} is no class; the model has {known}")
    return numbers
