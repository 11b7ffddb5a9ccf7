"""Sampling recipes of the experiments: equal numbers of each class."""

from typing import Any

from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.recipe import Guidance, Recipe, solving_defaults


def balanced_recipe(model: LatentDiffusion, num: int, **fields: Any) -> Recipe:
    """The recipe of `num` samples with seed 0, classes in turn, the model's default solver and no guidance.

    `fields` replace fields of this recipe.
    """
    recipe = Recipe(
        num=num,
        seed=0,
        labels=list(range(len(model.class_names))),
        prompts=[],
        size=list(model.image_shape[:2]),
        dtype=model.dtype,
        solving=solving_defaults(model, model.defaults.sampler),
        guidance=make_guidance(1.0),
    )
    return recipe._replace(**fields)


def make_guidance(scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Guidance:
    """Classifier-free guidance with this scale, within this interval of t / T."""
    return Guidance(scale, list(interval))
