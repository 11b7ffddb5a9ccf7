"""Images of a recipe, and the files that they are written to."""

import hashlib
import re
import zlib
from collections.abc import Callable
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
from ldm_jax.errors import InputError, RunError
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params, fingerprint
from ldm_jax.runtime.files import atomic, content_hash
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.terminal import warn
from ldm_jax.sampling import concat_inputs, image_grids, image_inputs
from ldm_jax.sampling.concat_inputs import ConcatImages
from ldm_jax.sampling.guidance_models import GuidanceModels, guidance_models
from ldm_jax.sampling.inputs import concat_images_of, read_images, sample_inputs, with_edit
from ldm_jax.sampling.recipe import Recipe, check_cfgpp, from_json, to_json
from ldm_jax.sampling.recipe_of_run import recipe_of_run
from ldm_jax.sampling.refiner import Stage, load_refiner, refine
from ldm_jax.sampling.sampler import Progress, smallest_batch
from ldm_jax.sampling.tables import make_table

IMAGES = "images"  # the folder of single images


class Samples(NamedTuple):
    """The samples of a recipe."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]: class, or index of the prompt; -1 = none
    trajectory: np.ndarray | None  # uint8 [S, M, H, W, C]: z0_hat of the first M images while sampling
    recipe: dict[str, Any]  # as JSON, with hashes of the model and the input files
    concat_images: ConcatImages | None  # inputs of concat conditioning
    grid: Image.Image  # of the first images
    condition_names: tuple[str, ...]  # class names or prompts, by label


def sample_images(
    model: LatentDiffusion,
    params: Params,
    recipe: Recipe,
    *,
    batch_size: int,
    trajectory: bool = True,
    watch: Callable[[Progress], None] | None = None,
    model_hash: str | None = None,
) -> Samples:
    """Samples the images of a recipe, with a progress bar, and the trajectory of the first of them.

    `batch_size` is rounded down to a multiple of the devices. `watch` is called with the progress of each batch;
    `model_hash` is the model's fingerprint where it is known already, as it takes a while. Raises InputError for a
    solver or number of steps that the model does not take, or an input that is missing or does not fit; RunError if no
    sample is finite.
    """
    check_cfgpp(model, recipe)
    refiner = load_refiner(recipe, model, params)
    at_own_size, model = model, _at_recipe(model, recipe)
    table = make_table(model, recipe.solving, recipe.edit, denoising_end=recipe.refiner_start)
    image, mask = read_images(model, recipe)
    guides, whole = guidance_models(recipe, at_own_size, params), image
    if recipe.edit.outpaint:
        image, mask = image_inputs.outpaint_window(image, recipe.edit.outpaint)
    concat_images = concat_images_of(model, recipe, image, mask)
    batch_size = smallest_batch(recipe.num, batch_size, jax.local_device_count())
    sampler = guides.sampler(model, batch_size, cfgpp=recipe.guidance.cfgpp)
    replicated = replicate(params | guides.params)
    labels, inputs = sample_inputs(model, replicated, recipe, sampler, concat_images, guides.clip)
    inputs = with_edit(model, recipe, sampler, replicated, inputs, image, mask)
    stages = [Stage(sampler, replicated, inputs, table)]
    if refiner:
        stages.append(refine(_at_recipe(refiner[0], recipe), refiner[1], recipe, stages[0], batch_size))
    images = _sampled(stages[-1], watch)
    images = concat_inputs.paste_known(
        concat_images, images if mask is None else np.where(mask[..., None], images, image)
    )
    if recipe.edit.outpaint:
        images, concat_images = image_inputs.outpainted(whole, images, recipe.edit.outpaint), None
    few = min(recipe.num, 2 * max(len(recipe.labels), 8))
    frames = np.concatenate([stage.trajectory(few) for stage in stages]) if trajectory else None
    of_model = model_hash or fingerprint(model, params)
    about = {"model": of_model, "step": model.origin.step, "inputs": input_hashes(recipe, guides, refiner)}
    grid = sample_grid(model, recipe, images, labels, concat_images)
    names = model.class_names or tuple(recipe.prompts)
    return Samples(images, labels, frames, about | to_json(recipe), concat_images, grid, names)


def _sampled(stage: Stage, watch: Callable[[Progress], None] | None = None) -> np.ndarray:
    """The images of the last stage, with a progress bar, uint8 [N, H, W, C].

    Prints a warning if some are black or not finite; raises RunError if none is finite.
    """
    sampler, params, inputs, table = stage
    batches, finite, num = [], [], len(inputs.samples.index)
    with tqdm(total=num, unit="image", desc="    sampling", unit_scale=False) as bar:
        latents = (z for z, _ in sampler.latents(params, inputs, table))
        for z in sampler.watched_latents(params, inputs, table, watch) if watch else latents:
            batches.append(sampler.decode(params, z))
            finite.append(np.isfinite(z).all(axis=(1, 2, 3)))
            bar.update(len(z))
    images, finite = np.concatenate(batches), np.concatenate(finite)
    advice = "try --dtype=float32, another --sampler, more --steps or less --guidance"
    if not finite.any():
        raise RunError(f"no sample is finite, nothing was written; {advice}")
    bad = np.flatnonzero(~finite | ~images.any(axis=(1, 2, 3)))  # an autoencoder may overflow too, to black
    if len(bad):
        problem = f"{len(bad)} of {num} samples are black or not finite, the first is sample {bad[0]}"
        warn(f"warning: {problem}; {advice}")
    return images


def _at_recipe(model: LatentDiffusion, recipe: Recipe) -> LatentDiffusion:
    """The model at a recipe's size, and with a tiled autoencoder if the recipe has it."""
    model = model.at_size(tuple(recipe.size))
    if not recipe.vae_tiling:
        return model
    try:
        return replace(model, first_stage=replace(model.first_stage, tiled=True))
    except ValueError as error:
        raise InputError(f"--vae_tiling: tiles are of the autoencoder's sample_size, but {error}") from error


def input_hashes(
    recipe: Recipe, guides: GuidanceModels, refiner: tuple[LatentDiffusion, Params] | None = None
) -> dict[str, str]:
    """Hashes of the existing input files of a recipe, and of its other models' parameters, by path."""
    edit = recipe.edit
    files = (edit.init_image, edit.mask, edit.to_image, edit.init_latents, recipe.concat.image)
    hashes = {f: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16] for f in files if f and Path(f).is_file()}
    hashes |= {getattr(recipe.guidance, name): content_hash(params) for name, params in guides.params.items()}
    return hashes | ({recipe.refiner: fingerprint(*refiner)} if refiner else {})


def check_inputs(recipe: Recipe, recorded: dict[str, str], model: LatentDiffusion, params: Params, where: str) -> None:
    """Raises InputError, which names `where`, if an input of a recipe has changed since it was recorded."""
    models = guidance_models(recipe, model, params), load_refiner(recipe, model, params)
    for file, digest in input_hashes(recipe, *models).items():
        if recorded.get(file) != digest:
            raise InputError(f"{where} was sampled from another {file} than the one that is there now")


def save(folder: Path, samples: Samples, *, each: bool = False) -> None:
    """Writes samples.npz, samples.png (with the recipe in it) and, of a trajectory, denoising.gif to `folder`.

    With `each` also images/INDEX_seedSEED_CONDITION.png, replacing those of earlier samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "samples.npz") as temporary:
        np.savez_compressed(temporary, images=samples.images, labels=samples.labels)
    image_grids.save_png(samples.grid, folder / "samples.png", samples.recipe)
    if samples.trajectory is not None:
        image_grids.save_denoising_gif(samples.trajectory, folder / "denoising.gif")
    if each:
        _save_each(folder / IMAGES, samples)


def _save_each(folder: Path, samples: Samples) -> None:
    """Writes each image as a PNG with the recipe in it."""
    seed, names = samples.recipe["seed"], samples.condition_names
    for old in folder.glob("*_seed*.png"):
        old.unlink()
    for index, (image, label) in enumerate(zip(samples.images, samples.labels)):
        condition = re.sub(r"\W+", "-", names[label]).strip("-")[:40] if label >= 0 and names else ""
        name = "_".join(filter(None, (f"{index:05d}", f"seed{seed}", condition)))
        mode = image[..., 0] if image.shape[-1] == 1 else image
        image_grids.save_png(Image.fromarray(mode), folder / f"{name}.png", samples.recipe | {"index": index})


def sample_grid(
    model: LatentDiffusion, recipe: Recipe, images: np.ndarray, labels: np.ndarray, concat_images: ConcatImages | None
) -> Image.Image:
    """The grid of images [N, H, W, C]: a row for each class or prompt, or each sample below its concat conditioning."""
    if concat_images is None:
        rows, names = _rows(recipe, labels, model.class_names)
        return image_grids.sample_grid(images, rows, names or None)
    rows = {"input": np.broadcast_to(concat_inputs.visualize(model, concat_images), images.shape), "sample": images}
    if concat_images.originals is not None:
        rows["original"] = concat_images.originals
    return image_grids.comparison({name: some[:40] for name, some in rows.items()})


def _rows(recipe: Recipe, labels: np.ndarray, class_names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The row of each image in a grid, and the names of the rows."""
    if recipe.edit.to_prompt is not None:
        return labels, (f"{recipe.prompts[0]} - {recipe.edit.to_prompt}",)
    if recipe.prompts and (labels < 0).all():  # of CLIP guidance
        return np.arange(len(labels)) % len(recipe.prompts), tuple(recipe.prompts)
    return labels, class_names or tuple(recipe.prompts)


def sample_run(workdir: Path, dataset: Dataset) -> None:
    """Samples the recipe of a run (`recipe_of_run`), unless the run folder has its samples already."""
    if not config_io.from_json(workdir / "config.json").sampling.num:
        return
    model, params = load(workdir)
    recipe = recipe_of_run(model, dataset)
    if not _is_sampled(workdir, recipe, fingerprint(model, params)):
        save(workdir, sample_images(model, params, recipe, batch_size=model.defaults.batch_size))


def _is_sampled(folder: Path, recipe: Recipe, of_model: str) -> bool:
    """Whether the folder has undamaged files of this recipe and model."""
    try:
        recorded = image_grids.read_recipe(folder / "samples.png")
        with (folder / "samples.npz").open("rb") as file, np.load(file) as samples:  # np.load leaves a bad one open
            complete = {"images", "labels"} <= {*samples} and len(samples["images"]) == recipe.num
        same = (
            from_json(recorded, "samples.png") == from_json(to_json(recipe), "") and recorded.get("model") == of_model
        )
    except (InputError, OSError, ValueError, BadZipFile, zlib.error):  # missing or damaged: sampled again
        return False
    return complete and same and (folder / "denoising.gif").exists()
