"""Sample grids during training: a few samples of the model with EMA parameters, from the same noise each time."""

from collections.abc import Callable

import jax
import numpy as np

from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import concat_inputs, image_grids
from ldm_jax.sampling.inputs import concat_images_of, sample_inputs
from ldm_jax.sampling.recipe_of_run import recipe_of_run
from ldm_jax.sampling.sample_images import sample_grid
from ldm_jax.sampling.sampler import make_sampler, smallest_batch
from ldm_jax.sampling.tables import make_table
from ldm_jax.training.run import Run

SIDE = 10  # rows and columns of a grid at most


def make_preview(run: Run, model: LatentDiffusion, params: Params) -> Callable[[int, Params], None]:
    """`preview(step, params)` writes a grid to progress/: the first of the samples at the end of the run.

    `model` and `params` are the initial ones of the run, whose first stage is not trained.
    """
    config = run.config
    recipe = recipe_of_run(model, run.sampling_set)
    num = SIDE * min(len(recipe.labels) or SIDE, SIDE)
    recipe = recipe._replace(num=min(num, recipe.num or num))
    sampler = make_sampler(model, smallest_batch(recipe.num, config.sampling.batch_size, jax.local_device_count()))
    table, concat_images = make_table(model, recipe.solving), concat_images_of(model, recipe, None, None)
    labels, inputs = sample_inputs(model, replicate(params), recipe, sampler, concat_images)

    def preview(step: int, params: Params) -> None:
        images = np.concatenate(list(sampler.images(replicate(params), inputs, table)))
        grid = sample_grid(model, recipe, concat_inputs.paste_known(concat_images, images), labels, concat_images)
        image_grids.save_png(grid, run.workdir / "progress" / f"diffusion_{step:06d}.png")

    return preview
