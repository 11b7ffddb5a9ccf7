"""The ensemble of SDXL (Podell 2023, section 2.5): a refiner goes on from the latents of the base model."""

from typing import Any, NamedTuple

import numpy as np

from ldm_jax.diffusion.random import refiner_seed
from ldm_jax.diffusion.tables import Table
from ldm_jax.errors import InputError
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.recipe import Recipe
from ldm_jax.sampling.sampler import SampleInputs, Sampler, make_sampler
from ldm_jax.sampling.tables import make_table


class Stage(NamedTuple):
    """A sampler with all its arguments: that of the base model, or of the refiner."""

    sampler: Sampler
    params: Any  # replicated
    inputs: SampleInputs
    table: Table

    def latents(self) -> np.ndarray:
        """The latents z [N, h, w, c] that it ends with."""
        return np.concatenate([np.asarray(z) for z, _ in self.sampler.latents(self.params, self.inputs, self.table)])

    def trajectory(self, num: int) -> np.ndarray:
        """The trajectory of the first `num` samples: see `Sampler.trajectory`."""
        return self.sampler.trajectory(self.params, self.inputs.first(num), self.table)


def load_refiner(recipe: Recipe, model: LatentDiffusion, params: Params) -> tuple[LatentDiffusion, Params] | None:
    """The refiner of a recipe and its parameters, or None; raises InputError for one that does not fit the model."""
    if recipe.refiner is None:
        return None
    where, guidance = f"--refiner={recipe.refiner}", recipe.guidance
    try:
        refiner, its_params = load(recipe.refiner, recipe.dtype)
    except InputError as error:
        raise InputError(f"--refiner: {error}") from error
    texts = all(isinstance(each.conditioning, TextConditioning) for each in (model, refiner))
    if not texts or refiner.concat:
        raise InputError(f"{where}: it and --model must be text-to-image models, and it without other inputs")
    if guidance.classifier or guidance.clip or guidance.guide_model:
        raise InputError(f"{where}: --classifier, --clip and --guide_model do not go with a refiner")
    factor, channels = model.first_stage.downsampling, model.latent_shape[-1]
    scaling = all(np.array_equal(params[name], its_params[name]) for name in ("shift", "scale"))
    if (refiner.first_stage.downsampling, refiner.latent_shape[-1]) != (factor, channels) or not scaling:
        raise InputError(f"{where} has latents of another size, shift or scale than --model; they must be the same")
    if refiner.process != model.process:
        raise InputError(f"{where} has another noise schedule than --model; it must have the same")
    return refiner, its_params


def refine(refiner: LatentDiffusion, params: Params, recipe: Recipe, base: Stage, batch_size: int) -> Stage:
    """The refiner's stage, which begins with the latents that the base ends with.

    `refiner` has the recipe's size; `batch_size` is a multiple of the devices. Raises InputError if its noise levels do
    not continue the base's.
    """
    table = make_table(refiner, recipe.solving, denoising_start=recipe.refiner_start)
    last = int(base.table.rows) - 1
    reached = base.table.reached_alpha[last], base.table.reached_sigma[last]
    if not np.allclose(reached, (table.alpha[0], table.sigma[0]), rtol=1e-6):
        levels = [f"{sigma / alpha:.4g}" for alpha, sigma in (reached, (table.alpha[0], table.sigma[0]))]
        begins = f"begins at sigma / alpha = {levels[1]}, where --model ends at {levels[0]}"
        raise InputError(f"--refiner={recipe.refiner} {begins}; choose a --sampler and --spacing for both")
    sampler, replicated = make_sampler(refiner, batch_size, cfgpp=recipe.guidance.cfgpp), replicate(params)
    _, inputs = sample_inputs(refiner, replicated, recipe, sampler)
    shared = inputs.shared._replace(z0=base.inputs.shared.z0, mask=base.inputs.shared.mask)
    samples = inputs.samples._replace(z_T=base.latents())
    inputs = inputs._replace(samples=samples, shared=shared, seed=refiner_seed(recipe.seed), scaled_initial_noise=False)
    return Stage(sampler, replicated, inputs, table)
