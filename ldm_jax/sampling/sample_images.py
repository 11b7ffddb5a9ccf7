"""From a recipe to pictures, and to the files they go to."""

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from ldm_jax.config import io as config_io
from ldm_jax.data import from_config as data_from_config
from ldm_jax.data.datasets import Dataset
from ldm_jax.diffusion.random import initial_latents, sample_keys
from ldm_jax.diffusion.spacing import EVEN
from ldm_jax.diffusion.tables import Table
from ldm_jax.errors import InputError
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline.model import Trained
from ldm_jax.pipeline.upscaler import noised
from ldm_jax.runtime import files as runtime_files
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import generate, guidance_models, image_grids, image_inputs, tables
from ldm_jax.sampling.concat_inputs import Given, from_map, from_masked, from_split, keep_known, shown
from ldm_jax.sampling.generate import Generator, Request, request, smallest_batch
from ldm_jax.sampling.guidance_models import Guides
from ldm_jax.sampling.recipe import Recipe, digests, guides_of, of_config


class Drawn(NamedTuple):
    """What came of a recipe."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]; -1 = no class
    denoising: np.ndarray | None  # uint8 [S, M, H, W, C]: the first few pictures on the way
    class_names: tuple[str, ...]
    recipe: dict[str, Any]  # everything that makes the same pictures again
    given: Given | None  # what a map told of them
    picture: Image.Image  # the first of them, for people


def draw(model: Trained, recipe: Recipe, *, batch_size: int, film: bool = True) -> Drawn:
    """Draws, with a progress bar; `film`: the first few pictures on the way as well.

    Raises:
      InputError: a solver or step count that the model does not take, or an input that is missing or does not fit.
    """
    model = pipeline_model.at_size(model, tuple(recipe.size))
    table = table_for(model, recipe)
    (image, mask), guided_by = _read_inputs(model, recipe), guides_of(model, recipe)
    if recipe.outpaint:
        whole, (image, mask) = image, image_inputs.outpaint_window(image, recipe.outpaint)
    given = _given(model.config, recipe, image, mask)
    batch_size = smallest_batch(recipe.num, batch_size, jax.local_device_count())
    generator = generate.generator_of(model, batch_size, guided_by, vae_tiling=recipe.vae_tiling)
    params = replicate(model.params | guided_by.params)
    wanted = request_for(model, recipe, table, given, lambda known: generator.maps(params, known))
    wanted = _led(model, recipe, guided_by, wanted)
    wanted = wanted._replace(**_beginning(model, recipe, generator, params, wanted, image, mask))
    images = []
    with tqdm(total=recipe.num, unit="image", desc="    sampling", unit_scale=False) as bar:
        for some in generator.images(params, wanted, table):
            images.append(some if mask is None else np.where(mask[..., None], some, image))
            bar.update(len(some))
    images = keep_known(given, np.concatenate(images))
    if recipe.outpaint:
        images, given = image_inputs.outpainted(whole, images, recipe.outpaint), None
    few = min(recipe.num, 2 * max(len(recipe.labels), 8))
    about = {"model": pipeline_model.fingerprint(model), "step": model.step, "inputs": digests(recipe, guided_by)}
    return Drawn(
        images,
        wanted.labels,
        generator.denoising(params, wanted.first(few), table) if film else None,
        model.class_names,
        about | recipe._asdict(),
        given,
        picture(model.config, images, *_rows(recipe, wanted.labels, model.class_names), given),
    )


def table_for(model: Trained, recipe: Recipe) -> Table:
    """The solver table of a recipe; raises InputError for one that the model does not take."""
    return tables.table_of(
        model,
        sampler=recipe.sampler,
        steps=recipe.steps,
        spacing=recipe.spacing if isinstance(recipe.spacing, str) else tuple(recipe.spacing),
        jump=recipe.resample_jump,
        **{name: getattr(recipe, name) for name in ("eta", "churn", "variance", "strength", "resample")},
    )


def request_for(
    model: Trained,
    recipe: Recipe,
    table: Table,
    given: Given | None,
    to_maps: Callable[[dict[str, np.ndarray]], np.ndarray],
) -> Request:
    """What a recipe asks of a generator, from noise alone; `to_maps` makes what the UNet sees of what is known."""
    wanted = request(
        recipe.num,
        recipe.labels,
        guidance=recipe.guidance,
        seed=recipe.seed,
        negative=recipe.negative_label,
        interval=tuple(recipe.guidance_interval),
        rescale=recipe.guidance_rescale,
        threshold=recipe.threshold,
        classifier_scale=np.full(recipe.num, recipe.classifier_scale, np.float32),
    )
    if model.pretrained:
        wanted = wanted._replace(**of_pretrained(model, recipe, table))
    if given is None:
        return wanted
    maps = to_maps(given.known)
    if model.pretrained and model.pretrained.upscaling:
        maps = noised(maps, recipe.noise_level, model.pretrained.upscaling, recipe.seed, recipe.num)
    wanted = wanted._replace(maps=np.broadcast_to(maps, (recipe.num, *maps.shape[1:])))
    if given.labels is None or recipe.prompts:  # which the recipe's labels are numbers of
        return wanted
    return wanted._replace(labels=given.labels)


def of_pretrained(model: Trained, recipe: Recipe, table: Table) -> dict[str, Any]:
    """The fields of a Request that a diffusers model has beside: its texts, and what its scheduler wants."""
    scheduler = pipeline_model.scheduler_of(model.pretrained, recipe.sampler)
    fields = {"start": scheduler.start(table), "clip": scheduler.clip}
    if not recipe.prompts:
        return fields
    size, (prompts, negative) = (
        pipeline_from_config.picture_size(model.config),
        (recipe.prompts, recipe.negative_prompt),
    )
    prompts = [*prompts, *([recipe.to_prompt] if recipe.to_prompt else [])]
    texts, cut = model.pretrained.texts(prompts, negative, size, recipe.noise_level)
    if cut:
        print(
            f"warning: {cut} of the prompts are longer than the model reads; their ends are left out", file=sys.stderr
        )
    if recipe.to_prompt:  # from the same noise throughout
        ids, shares = np.zeros(recipe.num, np.int32), np.linspace(0, 1, recipe.num, dtype=np.float32)
        fields |= {"ids": ids, "toward": len(recipe.prompts), "shares": shares}
    return fields | {"texts": texts}


def _led(model: Trained, recipe: Recipe, guided_by: Guides, wanted: Request) -> Request:
    """The request with what a CLIP that guides is to see in each picture: its own prompt, or the prompts in turn."""
    if not guided_by.clip:
        return wanted
    told_texts = model.pretrained and model.pretrained.encoders
    rows = wanted.labels if told_texts else np.arange(recipe.num) % len(recipe.prompts)
    sought = guidance_models.sought(guided_by.clip, recipe.prompts, rows)
    return wanted._replace(sought=sought, clip_scale=np.full(recipe.num, recipe.clip_scale, np.float32))


def _rows(recipe: Recipe, labels: np.ndarray, class_names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """For people: which row each picture stands in, and what the rows are called."""
    if recipe.to_prompt:
        return labels, (f"{recipe.prompts[0]} - {recipe.to_prompt}",)
    if recipe.prompts and (labels < 0).all():  # only a CLIP knows of them
        return np.arange(len(labels)) % len(recipe.prompts), tuple(recipe.prompts)
    return labels, class_names or tuple(recipe.prompts)


def _read_inputs(model: Trained, recipe: Recipe) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The picture and the mask that are begun from, uint8 [H, W, C] and bool [H, W], or None."""
    data, image, mask = model.config.data, None, None
    if recipe.init_image:
        path, like = (
            Path(recipe.init_image),
            {"size": pipeline_from_config.picture_size(model.config), "crop": data.crop},
        )
        image = image_inputs.read_image(path, "--init_image", channels=data.channels, **like)
        if recipe.mask:
            mask = image_inputs.read_mask(Path(recipe.mask), path, **like)
    return image, mask


def _given(config: ConfigDict, recipe: Recipe, image: np.ndarray | None, mask: np.ndarray | None) -> Given | None:
    """What a model with a map condition is given; None for others."""
    if config.concat.kind == "none":
        return None
    if recipe.map:
        return from_map(config, Path(recipe.map))
    if recipe.map_split:
        return from_split(config, data_from_config.load_split(config, recipe.map_split), recipe.num, recipe.seed)
    return from_masked(image, mask)


def _beginning(
    model: Trained,
    recipe: Recipe,
    generator: Generator,
    params: Any,
    wanted: Request,
    image: np.ndarray | None,
    mask: np.ndarray | None,
) -> dict[str, Any]:
    """The fields of a Request that say what it begins from: noise, latents and where they are kept."""
    shape, shares = pipeline_from_config.latent_shape(model.config), np.linspace(0, 1, recipe.num)
    noise: dict[str, Any] = {}
    if recipe.init_latents:
        noise = {"z_T": image_inputs.read_latents(Path(recipe.init_latents), (recipe.num, *shape))}
    if recipe.to_seed >= 0:
        ends = [initial_latents(sample_keys(np.uint32(s), np.zeros(1, int)), shape)[0]
                for s in (recipe.seed, recipe.to_seed)]  # fmt: skip
        noise = {"z_T": image_inputs.slerp(*ends, shares)}
    if image is None:
        return noise
    if recipe.invert or recipe.to_image:
        end, data = image, model.config.data
        if recipe.to_image:
            like = {"size": image.shape[:2], "channels": data.channels, "crop": data.crop}
            end = image_inputs.read_image(Path(recipe.to_image), "--to_image", **like)
        z0 = generator.encode(params, np.stack([image, end]))
        spacing = recipe.spacing if recipe.spacing in EVEN else "trailing"
        table = tables.inversion_table_of(model, recipe.steps, spacing)
        plain = wanted.first(2)._replace(ids=np.arange(2, dtype=np.int32), z_T=z0, start=1.0)
        plain = plain._replace(labels=wanted.labels[[0, -1]], guidance=np.ones(2, np.float32))
        plain = plain._replace(classifier_scale=None, clip_scale=None, toward=None)
        ends = np.concatenate([z for z, _ in generator.latents(params, plain, table)])
        return {"z_T": image_inputs.slerp(*ends, shares), "start": 1.0}
    if model.config.concat.kind == "inpainting" and recipe.strength == 1:  # its map says all that is known
        return noise
    z0 = generator.encode(params, image[None])[0]
    if mask is None or model.config.concat.kind == "inpainting":
        return noise | {"z0": z0}
    return noise | {"z0": z0, "mask": image_inputs.mask_of_latents(mask, len(mask) // shape[0])}


def save(folder: Path, drawn: Drawn) -> None:
    """Writes samples.npz, samples.png (with the recipe in it) and denoising.gif, if there is one, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with runtime_files.atomic(folder / "samples.npz") as temporary:
        np.savez_compressed(temporary, images=drawn.images, labels=drawn.labels)
    image_grids.save_png(drawn.picture, folder / "samples.png", drawn.recipe)
    if drawn.denoising is not None:
        image_grids.save_denoising_gif(drawn.denoising, folder / "denoising.gif")


def picture(
    config: ConfigDict, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], given: Given | None
) -> Image.Image:
    """For people: a row for each class, or, of a model with a map condition, each drawing below what it was made of."""
    if given is None:
        return image_grids.sample_grid(images, labels, class_names or None)
    rows = {"given": np.broadcast_to(shown(config, given), images.shape), "drawn": images}
    if given.originals is not None:
        rows["original"] = given.originals
    return image_grids.comparison({name: some[:40] for name, some in rows.items()})


def draw_final(workdir: Path, dataset: Dataset) -> None:
    """Draws the samples that end a run (see `recipe.of_config`), unless the run folder has just these already."""
    if not config_io.from_json(workdir / "config.json").sampling.num:
        return
    model = pipeline_load.load(workdir)
    recipe = of_config(model, dataset)
    asked = recipe._asdict() | {"model": pipeline_model.fingerprint(model)}
    if not _is_drawn(workdir, asked):
        save(workdir, draw(model, recipe, batch_size=model.config.sampling.batch_size))


def _is_drawn(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether the folder has sound files of a recipe that is as `asked`."""
    try:
        found = image_grids.read_recipe(folder / "samples.png")
        with (folder / "samples.npz").open("rb") as file, np.load(file) as samples:  # np.load leaves a bad one open
            complete = {"images", "labels"} <= {*samples} and len(samples["images"]) == asked["num"]
    except (InputError, OSError, ValueError, BadZipFile, zlib.error):  # missing or damaged: drawn again
        return False
    same = all(found.get(name) == value for name, value in asked.items())
    return complete and same and (folder / "denoising.gif").exists()
