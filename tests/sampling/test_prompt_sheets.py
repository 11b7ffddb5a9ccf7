"""Prompt sheets of a text-to-image model: the samples of the recipe, with its guidance."""

import diffusers_folder
import numpy as np
import pytest

from ldm_jax.pipeline.load import load
from ldm_jax.sampling.prompt_sheets import make_prompt_sampler
from ldm_jax.sampling.recipe import default_recipe
from ldm_jax.sampling.sample_images import sample_images

PROMPTS = ["low", "lower"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return diffusers_folder.write_stable_diffusion(tmp_path_factory.mktemp("texts") / "model")


@pytest.mark.parametrize("guided", [False, True])
def test_sheets_have_the_samples_of_the_recipe(guided, folder):
    """By classifier-free guidance, or by autoguidance."""
    model, params = load(folder)
    recipe = default_recipe(model, 4, 3, [0, 0, 1, 1], PROMPTS)
    guidance = recipe.guidance._replace(scale=4.0, guide_model=str(folder) if guided else None)
    solving = recipe.solving._replace(steps=3)
    recipe = recipe._replace(guidance=guidance, solving=solving)
    sheet = make_prompt_sampler(model, params, recipe)(PROMPTS, [4.0, 4.0])
    samples = sample_images(model, params, recipe, batch_size=4, trajectory=False).images
    assert np.abs(sheet.reshape(samples.shape).astype(int) - samples).max() <= 1
    other = recipe._replace(guidance=guidance._replace(guide_model=None if guided else str(folder)))
    assert np.abs(sample_images(model, params, other, batch_size=4, trajectory=False).images - samples).max() > 1
