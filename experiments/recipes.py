"""Recipes of samples that are compared: the same number of each class."""

from typing import Any

from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.from_flags import solving_defaults
from ldm_jax.sampling.recipe import Guidance, Recipe


def each_class(model: LatentDiffusion, num: int, **choices: Any) -> Recipe:
    """`num` samples of seed 0, the classes in turn, by the model's own solver and without guidance.

    `choices` are fields of the recipe that differ from that.
    """
    recipe = Recipe(
        num=num,
        seed=0,
        labels=list(range(len(model.class_names))),
        prompts=[],
        size=list(model.image_shape[:2]),
        dtype=model.dtype,
        solving=solving_defaults(model, model.defaults.sampler),
        guidance=guided(1.0),
    )
    return recipe._replace(**choices)


def guided(scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Guidance:
    """Classifier-free guidance by this scale, within this fraction of the timesteps."""
    return Guidance(scale, list(interval))
