"""The inputs of a sampler from a recipe: a tree of arrays, from conditions, images, masks and noise."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.data.from_config import load_split
from ldm_jax.diffusion.random import initial_latents, low_resolution_noise, sample_keys
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling import concat_inputs, image_inputs
from ldm_jax.sampling.concat_inputs import ConcatImages
from ldm_jax.sampling.guidance_models import GuidanceModels, text_embeds
from ldm_jax.sampling.recipe import Recipe
from ldm_jax.sampling.sampler import PerSample, SampleInputs, Sampler, Shared
from ldm_jax.sampling.tables import inversion_table


def sample_inputs(
    model: LatentDiffusion, params: Any, recipe: Recipe, sampler: Sampler, concat_images: ConcatImages | None = None
) -> tuple[np.ndarray, SampleInputs]:
    """The labels int32 [N] of a recipe's samples, and their arrays, to be sampled from noise alone.

    `params` are replicated; `concat_images` are what concat conditioning is made of.
    """
    index, guidance = np.arange(recipe.num, dtype=np.int32), recipe.guidance
    labels = np.full(recipe.num, -1, np.int32)
    if recipe.labels:
        labels = np.asarray(recipe.labels, np.int32)[index % len(recipe.labels)]
    scale = guidance.scale if recipe.labels else 1.0
    if concat_images is not None and concat_images.labels is not None and not recipe.prompts:
        labels = concat_images.labels
    table, truncated = condition_table(model, recipe)
    if truncated:
        warning = f"{truncated} of the prompts are longer than the text encoder's context; their ends are left out"
        print(f"warning: {warning}", file=sys.stderr)
    samples = PerSample(
        index=index,
        cond=_rows_of(table, labels),
        guidance=np.full(recipe.num, scale, np.float32),
        concat=None if concat_images is None else _concat_arrays(model, params, recipe, sampler, concat_images),
    )
    if guidance.classifier:
        scales = np.full(recipe.num, guidance.classifier_scale, np.float32)
        samples = samples._replace(label=labels, classifier_scale=scales)
    if recipe.edit.to_prompt is not None:  # from the same noise throughout
        last = np.full(recipe.num, len(recipe.prompts))
        weights = np.linspace(0, 1, recipe.num, dtype=np.float32)
        samples = samples._replace(
            index=np.zeros_like(index), interpolate_to=_rows_of(table, last), interpolate_weight=weights
        )
    scaled = model.defaults.solver(recipe.solving.sampler).scaled_initial_noise
    return labels, SampleInputs(samples, _shared(model, recipe, table), recipe.seed, scaled_initial_noise=scaled)


def condition_table(model: LatentDiffusion, recipe: Recipe) -> tuple[Any, int]:
    """The conditioning's table for a recipe, and how many of its prompts were truncated."""
    if not isinstance(model.conditioning, TextConditioning):
        return model.conditioning.table(), 0
    to_prompt = recipe.edit.to_prompt
    prompts = [*recipe.prompts, *([] if to_prompt is None else [to_prompt])]
    return model.conditioning.table(prompts, recipe.guidance.negative_prompt, tuple(recipe.size))


def _rows_of(table: Any, labels: np.ndarray) -> Any:
    """The rows of these labels, -1 being the null condition, the last row."""
    return jax.tree.map(lambda rows: np.asarray(rows)[labels], table)


def _shared(model: LatentDiffusion, recipe: Recipe, table: Any) -> Shared:
    guidance, shape = recipe.guidance, model.latent_shape
    negative = -1 if guidance.negative_label is None else guidance.negative_label
    return Shared(
        null_cond=_rows_of(table, np.array([negative], np.int32)),
        interval=np.asarray(guidance.interval, np.float32),
        rescale=np.float32(guidance.rescale),
        threshold=np.float32(recipe.solving.threshold),
        clip_sample_range=np.float32(model.defaults.solver(recipe.solving.sampler).clip_sample_range),
        z0=np.zeros(shape, np.float32),
        mask=np.ones((*shape[:2], 1), bool),
    )


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


def with_clip(
    recipe: Recipe, model: LatentDiffusion, guides: GuidanceModels, labels: np.ndarray, inputs: SampleInputs
) -> SampleInputs:
    """The arrays with the texts that a CLIP guides each image to: its own prompt, or the prompts in turn."""
    if guides.clip is None:
        return inputs
    own = isinstance(model.conditioning, TextConditioning)
    rows = labels if own else np.arange(recipe.num) % len(recipe.prompts)
    scales = np.full(recipe.num, recipe.guidance.clip_guidance_scale, np.float32)
    embeds = text_embeds(guides.clip, recipe.prompts, rows)
    return inputs._replace(samples=inputs.samples._replace(text_embeds=embeds, clip_guidance_scale=scales))


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
    model: LatentDiffusion, recipe: Recipe, image: np.ndarray | None, mask: np.ndarray | None
) -> ConcatImages | None:
    """What concat conditioning is made of; None for models without."""
    if model.concat is None:
        return None
    if recipe.concat.image:
        return concat_inputs.from_file(model, Path(recipe.concat.image))
    if recipe.concat.split:
        config = model.origin.config
        dataset = load_split(config, recipe.concat.split)
        return concat_inputs.from_split(model, dataset, recipe.num, recipe.seed, config.evaluation.batch_size)
    return concat_inputs.from_masked(image, mask)


def with_edit(
    model: LatentDiffusion,
    recipe: Recipe,
    sampler: Sampler,
    params: Any,
    inputs: SampleInputs,
    image: np.ndarray | None,
    mask: np.ndarray | None,
) -> SampleInputs:
    """The arrays with what sampling begins from: noise, an image's latents, and the region that is kept of these."""
    edit, shape, weights = recipe.edit, model.latent_shape, np.linspace(0, 1, recipe.num)
    if edit.init_latents:
        z_T = image_inputs.read_latents(Path(edit.init_latents), (recipe.num, *shape))
        inputs = _with_noise(inputs, z_T)
    if edit.to_seed is not None:
        ends = [initial_latents(sample_keys(np.uint32(s), np.zeros(1, int)), shape)[0]
                for s in (recipe.seed, edit.to_seed)]  # fmt: skip
        inputs = _with_noise(inputs, image_inputs.slerp(*ends, weights))
    if image is None:
        return inputs
    if edit.invert or edit.to_image:
        ends = _inverted(model, recipe, sampler, params, inputs, image)
        inputs = _with_noise(inputs, image_inputs.slerp(*ends, weights))
        return inputs._replace(scaled_initial_noise=False)
    inpaints = model.concat is not None and mask is not None
    if inpaints and edit.strength == 1:  # its concat conditioning has all that is known
        return inputs
    shared = inputs.shared._replace(z0=sampler.encode(params, image[None])[0])
    if mask is not None and not inpaints:
        shared = shared._replace(mask=image_inputs.latent_mask(mask, model.first_stage.downsampling))
    return inputs._replace(shared=shared, init_image=True)


def _with_noise(inputs: SampleInputs, z_T: np.ndarray) -> SampleInputs:
    return inputs._replace(samples=inputs.samples._replace(z_T=z_T))


def _inverted(
    model: LatentDiffusion, recipe: Recipe, sampler: Sampler, params: Any, inputs: SampleInputs, image: np.ndarray
) -> np.ndarray:
    """The noise of the initial image and of the one to interpolate to, [2, h, w, c], by DDIM inversion."""
    end, edit = image, recipe.edit
    if edit.to_image:
        fit = {"size": image.shape[:2], "channels": image.shape[-1], "crop": model.defaults.crop}
        end = image_inputs.read_image(Path(edit.to_image), "--to_image", **fit)
    z0, samples = sampler.encode(params, np.stack([image, end])), inputs.samples
    ends = jax.tree.map(lambda rows: np.asarray(rows)[[0, -1]], samples)
    zeros = {name: np.zeros(2, np.float32) for name in ("classifier_scale", "clip_guidance_scale")
             if getattr(samples, name) is not None}  # fmt: skip
    plain = ends._replace(
        index=np.arange(2, dtype=np.int32), z_T=z0, guidance=np.ones(2, np.float32), interpolate_to=None,
        interpolate_weight=None, **zeros,
    )  # fmt: skip
    inputs = inputs._replace(samples=plain, scaled_initial_noise=False)
    return np.concatenate([z for z, _ in sampler.latents(params, inputs, inversion_table(model, recipe.solving))])
