"""From a recipe to images, and to the files they go to."""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm_jax.config import io as config_io
from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params, fingerprint
from ldm_jax.runtime.files import atomic
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import concat_inputs, image_grids, image_inputs, recipe_of_run
from ldm_jax.sampling.concat_inputs import ConcatImages
from ldm_jax.sampling.guidance_models import GuidanceModels, guidance_models, hashes
from ldm_jax.sampling.inputs import concat_images_of, read_images, sample_inputs, with_clip, with_edit
from ldm_jax.sampling.recipe import Recipe, file_hashes, from_json, to_json
from ldm_jax.sampling.sampler import smallest_batch
from ldm_jax.sampling.tables import make_table


class Samples(NamedTuple):
    """The images of a recipe."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]: class, or index of the prompt; -1 = none
    trajectory: np.ndarray | None  # uint8 [S, M, H, W, C]: z0_hat of the first few images while sampling
    recipe: dict[str, Any]  # everything that the same images need again, for a PNG
    concat_images: ConcatImages | None  # what concat conditioning was made of
    grid: Image.Image  # the first of them


def sample_images(
    model: LatentDiffusion, params: Params, recipe: Recipe, *, batch_size: int, trajectory: bool = True
) -> Samples:
    """Samples the images of a recipe, with a progress bar.

    Args:
      model, params: the model.
      recipe: what to sample.
      batch_size: images at a time, a multiple of the devices or more than `recipe.num`.
      trajectory: whether to keep z0_hat of the first few images while sampling.

    Raises:
      InputError: a solver or step count that the model does not take, or an input that is missing or does not fit.
    """
    model = _at_recipe(model, recipe)
    table = make_table(model, recipe.solving, recipe.edit)
    image, mask = read_images(model, recipe)
    guides, whole = guidance_models(recipe, model, params), image
    if recipe.edit.outpaint:
        image, mask = image_inputs.outpaint_window(image, recipe.edit.outpaint)
    concat_images = concat_images_of(model, recipe, image, mask)
    sampler = guides.sampler(model, smallest_batch(recipe.num, batch_size, jax.local_device_count()))
    replicated = replicate(params | guides.params)
    labels, inputs = sample_inputs(model, replicated, recipe, sampler, concat_images)
    inputs = with_clip(recipe, model, guides, labels, inputs)
    inputs = with_edit(model, recipe, sampler, replicated, inputs, image, mask)
    batches = []
    with tqdm(total=recipe.num, unit="image", desc="    sampling", unit_scale=False) as bar:
        for images in sampler.images(replicated, inputs, table):
            batches.append(images if mask is None else np.where(mask[..., None], images, image))
            bar.update(len(images))
    images = concat_inputs.paste_known(concat_images, np.concatenate(batches))
    if recipe.edit.outpaint:
        images, concat_images = image_inputs.outpainted(whole, images, recipe.edit.outpaint), None
    few = min(recipe.num, 2 * max(len(recipe.labels), 8))
    about = {"model": fingerprint(model, params), "step": model.origin.step,
             "inputs": input_hashes(recipe, guides)}  # fmt: skip
    return Samples(
        images,
        labels,
        sampler.trajectory(replicated, inputs.first(few), table) if trajectory else None,
        about | to_json(recipe),
        concat_images,
        sample_grid(model, recipe, images, labels, concat_images),
    )


def _at_recipe(model: LatentDiffusion, recipe: Recipe) -> LatentDiffusion:
    """The model at a recipe's size, with its autoencoder in tiles if the recipe says so."""
    model = model.at_size(tuple(recipe.size))
    if not recipe.vae_tiling:
        return model
    try:
        return replace(model, first_stage=replace(model.first_stage, tiled=True))
    except ValueError as error:
        raise InputError(f"--vae_tiling: the autoencoder's sample_size says so, but {error}") from error


def input_hashes(recipe: Recipe, guides: GuidanceModels) -> dict[str, str]:
    """File or run folder -> hash, of all files that a recipe reads."""
    return file_hashes(recipe) | hashes(recipe, guides)


def check_inputs(recipe: Recipe, recorded: dict[str, str], model: LatentDiffusion, params: Params, where: str) -> None:
    """Raises InputError, which names `where`, if an input of a recipe has changed since it was recorded."""
    for file, digest in input_hashes(recipe, guidance_models(recipe, model, params)).items():
        if recorded.get(file) != digest:
            raise InputError(f"{where} was sampled from another {file} than the one that is there now")


def save(folder: Path, samples: Samples) -> None:
    """Writes samples.npz, samples.png (with the recipe in it) and denoising.gif, if there is one, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "samples.npz") as temporary:
        np.savez_compressed(temporary, images=samples.images, labels=samples.labels)
    image_grids.save_png(samples.grid, folder / "samples.png", samples.recipe)
    if samples.trajectory is not None:
        image_grids.save_denoising_gif(samples.trajectory, folder / "denoising.gif")


def sample_grid(
    model: LatentDiffusion, recipe: Recipe, images: np.ndarray, labels: np.ndarray, concat_images: ConcatImages | None
) -> Image.Image:
    """A grid of a recipe's images: a row for each class or prompt, or, with concat conditioning, each sample below its
    condition."""
    if concat_images is None:
        rows, names = _rows(recipe, labels, model.class_names)
        return image_grids.sample_grid(images, rows, names or None)
    rows = {"given": np.broadcast_to(concat_inputs.visualize(model, concat_images), images.shape), "sample": images}
    if concat_images.originals is not None:
        rows["original"] = concat_images.originals
    return image_grids.comparison({name: some[:40] for name, some in rows.items()})


def _rows(recipe: Recipe, labels: np.ndarray, class_names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Of a grid: the row of each image, and the names of the rows."""
    if recipe.edit.to_prompt is not None:
        return labels, (f"{recipe.prompts[0]} - {recipe.edit.to_prompt}",)
    if recipe.prompts and (labels < 0).all():  # of a CLIP that guides
        return np.arange(len(labels)) % len(recipe.prompts), tuple(recipe.prompts)
    return labels, class_names or tuple(recipe.prompts)


def sample_run(workdir: Path, dataset: Dataset) -> None:
    """The samples that end a run (see `recipe_of_run`), unless the run folder has just these already."""
    if not config_io.from_json(workdir / "config.json").sampling.num:
        return
    model, params = load(workdir)
    recipe = recipe_of_run.recipe_of_run(model, dataset)
    if not _is_sampled(workdir, recipe, fingerprint(model, params)):
        save(workdir, sample_images(model, params, recipe, batch_size=model.defaults.batch_size))


def _is_sampled(folder: Path, recipe: Recipe, of_model: str) -> bool:
    """Whether the folder has sound files of this recipe and model."""
    try:
        found = image_grids.read_recipe(folder / "samples.png")
        with (folder / "samples.npz").open("rb") as file, np.load(file) as samples:  # np.load leaves a bad one open
            complete = {"images", "labels"} <= {*samples} and len(samples["images"]) == recipe.num
        same = from_json(found, "samples.png") == from_json(to_json(recipe), "") and found.get("model") == of_model
    except (InputError, OSError, ValueError, BadZipFile, zlib.error):  # missing or damaged: sampled again
        return False
    return complete and same and (folder / "denoising.gif").exists()
