"""The recipe of the samples at the end of a run: of its config, and the captions of its data set."""

import numpy as np

from ldm_jax.config.rules import text_conditioned
from ldm_jax.data.datasets import Dataset
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.from_flags import NOISE_LEVEL
from ldm_jax.sampling.recipe import Recipe, default_recipe, with_guidance

FEW = 8  # captions of a fine-tuned model's samples, unless its config has prompts
SEARCHED = 64  # images searched for as many distinct captions


def recipe_of_run(model: LatentDiffusion, dataset: Dataset) -> Recipe:
    """The recipe of samples of a run's model.

    Args:
      model: with `origin.config`.
      dataset: the split of the captions: of training if the run trained its own CLIP, else the test split, of which a
        few captions are used, or with concat conditioning that of each image.
    """
    config, upscaler = model.origin.config, model.concat and model.concat.noise
    prompts, own_clip = list(config.sampling.prompts), text_conditioned(config)
    labels, num = list(range(len(prompts or model.class_names))), config.sampling.num
    if isinstance(model.conditioning, TextConditioning) and (own_clip or not prompts):
        prompts, labels = captions_of(dataset, num if own_clip or model.concat else 0)
    recipe = default_recipe(model, num, config.seed, labels, prompts)
    recipe = recipe._replace(concat=recipe.concat._replace(noise_level=NOISE_LEVEL if upscaler else None))
    return with_guidance(model, recipe)


def captions_of(dataset: Dataset, num_images: int) -> tuple[list[str], list[int]]:
    """Captions of a split's first images, and the caption's index for each; of 0 images, a few distinct captions."""
    labels = dataset[np.arange(min(num_images or SEARCHED, len(dataset)))]["label"].tolist()
    distinct = list(dict.fromkeys(labels))
    if not num_images:
        distinct = labels = distinct[:FEW]
    return [dataset.class_names[label] for label in distinct], [distinct.index(label) for label in labels]
