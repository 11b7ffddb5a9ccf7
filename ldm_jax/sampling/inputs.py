"""The inputs of a sampler from a recipe: arrays of conditions, images, masks and initial noise."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.data.from_config import load_split
from ldm_jax.diffusion.guidance import Projection
from ldm_jax.diffusion.random import initial_latents, low_resolution_noise, sample_keys
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.clip import TrainedCLIP, embed_texts
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.runtime.terminal import warn
from ldm_jax.sampling import concat_inputs, image_inputs
from ldm_jax.sampling.concat_inputs import ConcatImages
from ldm_jax.sampling.recipe import Recipe
from ldm_jax.sampling.sampler import PerSample, SampleInputs, Sampler, Shared
from ldm_jax.sampling.tables import inversion_table

WEIGHTED = re.compile(r"\([^()]*:\d+(\.\d+)?\)|<lora:[^<>]*>")  # in the prompts of other programs


def sample_inputs(
    model: LatentDiffusion,
    params: Any,
    recipe: Recipe,
    sampler: Sampler,
    concat_images: ConcatImages | None = None,
    clip: TrainedCLIP | None = None,
) -> tuple[np.ndarray, SampleInputs]:
    """The labels int32 [N] of a recipe's samples, and the sampler's inputs without image editing.

    `params` are replicated; `concat_images` are of a model with concat conditioning, `clip` of a sampler with one.
    """
    num, guidance, solver = recipe.num, recipe.guidance, model.defaults.solver(recipe.solving.sampler)
    index, shape = np.arange(num, dtype=np.int32), model.latent_shape
    labels = np.asarray(recipe.labels or [-1], np.int32)[index % max(len(recipe.labels), 1)]
    scale = guidance.scale if recipe.labels or guidance.guide_model else 1.0
    if concat_images is not None and concat_images.labels is not None and not recipe.prompts:
        labels = concat_images.labels
    table = _condition_table(model, recipe)
    samples = PerSample(
        index=index,
        cond=_rows_of(table, labels),
        guidance=np.full(num, scale, np.float32),
        concat=None if concat_images is None else _concat_arrays(model, params, recipe, sampler, concat_images),
    )
    if guidance.classifier:
        scales = np.full(num, guidance.classifier_scale, np.float32)
        samples = samples._replace(label=labels, classifier_scale=scales)
    if clip is not None:  # each sample to its own prompt, or to the prompts in turn
        rows = labels if isinstance(model.conditioning, TextConditioning) else index % len(recipe.prompts)
        embeds = embed_texts(clip, list(recipe.prompts), len(recipe.prompts) * jax.local_device_count())[rows]
        scales = np.full(num, guidance.clip_guidance_scale, np.float32)
        samples = samples._replace(text_embeds=embeds, clip_guidance_scale=scales)
    if recipe.edit.to_prompt is not None:  # all from the same noise
        samples = samples._replace(
            index=np.zeros_like(index),
            interpolate_to=_rows_of(table, np.full(num, len(recipe.prompts))),
            interpolate_weight=np.linspace(0, 1, num, dtype=np.float32),
        )
    negative = -1 if guidance.negative_label is None else guidance.negative_label
    shared = Shared(
        null_cond=_rows_of(table, np.array([negative], np.int32)),
        interval=np.asarray(guidance.interval, np.float32),
        rescale=np.float32(guidance.rescale),
        threshold=np.float32(recipe.solving.threshold),
        clip_sample_range=np.float32(solver.clip_sample_range),
        z0=np.zeros(shape, np.float32),
        mask=np.ones((*shape[:2], 1), bool),
        projection=Projection(np.float32(guidance.parallel), np.float32(guidance.max_norm or np.inf)),
        guide_null=np.bool_(guidance.guide_null),
    )
    return labels, SampleInputs(samples, shared, recipe.seed, scaled_initial_noise=solver.scaled_initial_noise)


def _condition_table(model: LatentDiffusion, recipe: Recipe) -> Any:
    """The conditioning's table for a recipe; prints a warning if prompts are truncated."""
    if not isinstance(model.conditioning, TextConditioning):
        return model.conditioning.table()
    prompts = [*recipe.prompts, *([] if recipe.edit.to_prompt is None else [recipe.edit.to_prompt])]
    table, truncated = model.conditioning.table(prompts, recipe.guidance.negative_prompt, tuple(recipe.size))
    if weighted := next(filter(None, map(WEIGHTED.search, prompts)), None):
        note = (
            f"{weighted[0]} is part of the text, as in diffusers: prompts have no weights here, and --lora adds a LoRA"
        )
        warn(f"note: {note}")
    if truncated:
        warning = f"{truncated} of the prompts are longer than the text encoder's context; their ends are left out"
        warn(f"warning: {warning}")
    return table


def _rows_of(table: Any, labels: np.ndarray) -> Any:
    """The rows of these labels, -1 being the null condition, the last row."""
    return jax.tree.map(lambda rows: np.asarray(rows)[labels], table)


def _concat_arrays(
    model: LatentDiffusion, params: Any, recipe: Recipe, sampler: Sampler, images: ConcatImages
) -> dict[str, np.ndarray]:
    """The denoiser's arguments of concat conditioning, [N, ...]."""
    concat, num = sampler.concat(params, images.degraded), recipe.num
    if model.concat.noise is None:
        return {"concat": np.broadcast_to(concat, (num, *concat.shape[1:]))}
    noise = low_resolution_noise(sample_keys(np.uint32(recipe.seed), np.arange(num)), concat.shape[1:])
    level = np.full(num, recipe.concat.noise_level, np.int32)
    noised, arguments = model.concat.noise.apply(concat, level, noise)
    return {"concat": np.asarray(noised), **arguments}


def read_images(model: LatentDiffusion, recipe: Recipe) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The initial image and the mask, uint8 [H, W, C] and bool [H, W], or None."""
    edit, image, mask = recipe.edit, None, None
    if edit.init_image:
        path, fit = Path(edit.init_image), {"size": model.image_shape[:2], "crop": model.defaults.crop}
        image = image_inputs.read_image(path, "--init_image", channels=model.image_shape[-1], **fit)
        if edit.mask:
            mask = image_inputs.read_mask(Path(edit.mask), path, **fit)
    return image, mask


def concat_images_of(
    model: LatentDiffusion, recipe: Recipe, image: np.ndarray | None = None, mask: np.ndarray | None = None
) -> ConcatImages | None:
    """The `ConcatImages` of a file or a split, or of the initial image and its mask."""
    if model.concat is None:
        return None
    if recipe.concat.image:
        return concat_inputs.from_file(model, Path(recipe.concat.image))
    if recipe.concat.split:
        config = model.origin.config
        dataset = load_split(config, recipe.concat.split)
        return concat_inputs.from_split(model, dataset, recipe.num, recipe.seed, config.evaluation.batch_size)
    return ConcatImages({"x": image[None], "mask": mask[None, ..., None].astype(np.uint8)})


def with_edit(
    model: LatentDiffusion,
    recipe: Recipe,
    sampler: Sampler,
    params: Any,
    inputs: SampleInputs,
    image: np.ndarray | None,
    mask: np.ndarray | None,
) -> SampleInputs:
    """The inputs with image editing: initial noise [N, h, w, c], the initial image's latents and their mask."""
    edit, shape, weights = recipe.edit, model.latent_shape, np.linspace(0, 1, recipe.num)
    z_T = None
    if edit.init_latents:
        z_T = image_inputs.read_latents(Path(edit.init_latents), (recipe.num, *shape))
    if edit.to_seed is not None:
        keys = [sample_keys(np.uint32(seed), np.zeros(1, int)) for seed in (recipe.seed, edit.to_seed)]
        z_T = image_inputs.slerp(*(initial_latents(key, shape)[0] for key in keys), weights)
    if edit.invert or edit.to_image:
        z_T = image_inputs.slerp(*_inverted(model, recipe, sampler, params, inputs, image), weights)
        inputs = inputs._replace(scaled_initial_noise=False)
    inputs = inputs._replace(samples=inputs.samples._replace(z_T=z_T))
    if image is None or edit.invert or edit.to_image:
        return inputs
    inpaints = model.concat is not None and mask is not None
    if inpaints and edit.strength == 1:  # concat conditioning has all known pixels
        return inputs
    shared = inputs.shared._replace(z0=sampler.encode(params, image[None])[0])
    if mask is not None and not inpaints:
        shared = shared._replace(mask=image_inputs.latent_mask(mask, model.first_stage.downsampling))
    return inputs._replace(shared=shared, init_image=True)


def _inverted(
    model: LatentDiffusion, recipe: Recipe, sampler: Sampler, params: Any, inputs: SampleInputs, image: np.ndarray
) -> np.ndarray:
    """The noise of the initial image and of the one to interpolate to, [2, h, w, c], by DDIM inversion."""
    other, samples, zeros = image, inputs.samples, np.zeros(2, np.float32)
    if recipe.edit.to_image:
        fit = {"size": image.shape[:2], "channels": image.shape[-1], "crop": model.defaults.crop}
        other = image_inputs.read_image(Path(recipe.edit.to_image), "--to_image", **fit)
    off = {n: zeros for n in ("classifier_scale", "clip_guidance_scale") if getattr(samples, n) is not None}
    plain = jax.tree.map(lambda rows: np.asarray(rows)[[0, -1]], samples)._replace(
        index=np.arange(2, dtype=np.int32), z_T=sampler.encode(params, np.stack([image, other])),
        guidance=np.ones(2, np.float32), interpolate_to=None, interpolate_weight=None, **off,
    )  # fmt: skip
    inputs = inputs._replace(samples=plain, scaled_initial_noise=False)
    return np.concatenate([z for z, _ in sampler.latents(params, inputs, inversion_table(model, recipe.solving))])
