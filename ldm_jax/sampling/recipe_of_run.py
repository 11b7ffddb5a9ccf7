"""The recipe that ends a run: of its config, with the captions of a data set for a text-to-image model."""

import numpy as np

from ldm_jax.config.rules import text_conditioned
from ldm_jax.data.datasets import Dataset
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.from_flags import NOISE_LEVEL, solving_defaults, test_split
from ldm_jax.sampling.recipe import ConcatInput, Guidance, Recipe

FEW = 8  # captions that a run is sampled by, unless its config has prompts
SEARCHED = 64  # images, for as many captions that differ


def recipe_of_run(model: LatentDiffusion, dataset: Dataset) -> Recipe:
    """The recipe of a run's own model.

    Args:
      model: with `origin.config`.
      dataset: the training split of a run with a CLIP of its own, whose images each give their caption; else the test
        split, of which a few do, or, of a model with concat conditioning, each.
    """
    config, defaults = model.origin.config, model.defaults
    sampling = config.sampling
    prompts, labels = list(sampling.prompts), list(range(len(sampling.prompts or model.class_names)))
    own, split = text_conditioned(config), test_split(model)
    if isinstance(model.conditioning, TextConditioning) and (own or not prompts):
        prompts, labels = captions_of(dataset, sampling.num if own or split else 0)
    return Recipe(
        num=sampling.num,
        seed=config.seed,
        labels=labels,
        prompts=prompts,
        size=list(model.image_shape[:2]),
        dtype=model.dtype,
        solving=solving_defaults(model, defaults.sampler),
        guidance=Guidance(
            defaults.guidance, interval=list(defaults.guidance_interval), rescale=defaults.guidance_rescale
        ),
        concat=ConcatInput(split=split, noise_level=NOISE_LEVEL if model.concat and model.concat.noise else None),
    )


def captions_of(dataset: Dataset, images: int) -> tuple[list[str], list[int]]:
    """Captions of a split's first images, and the index of each image's; of 0 images, a few that differ, in turn."""
    label = dataset[np.arange(min(images or SEARCHED, len(dataset)))]["label"].tolist()
    distinct = list(dict.fromkeys(label))
    if not images:
        distinct = label = distinct[:FEW]
    return [dataset.class_names[number] for number in distinct], [distinct.index(number) for number in label]
