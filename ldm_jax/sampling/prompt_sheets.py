"""Samples of a text-to-image run by prompts: grids with a row for each prompt, and the images of held-out captions.

prompts/training.png   captions of the training split, after a training image
prompts/held_out.png   the same of the test split; held_out.npz has as many as there are samples
prompts/made_up.png    config.sampling.prompts
prompts/guidance.png   a few captions at rising guidance scales
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from ldm_jax.data.datasets import Dataset
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params, fingerprint
from ldm_jax.runtime.files import atomic, read_json, write_json
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import image_grids
from ldm_jax.sampling.guidance_models import guidance_models
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.recipe import Recipe, to_json
from ldm_jax.sampling.recipe_of_run import recipe_of_run
from ldm_jax.sampling.sampler import smallest_batch
from ldm_jax.sampling.tables import make_table

FOLDER = "prompts"
ROWS, COLUMNS = 12, 8
SCALES = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)  # of guidance; 0 is unconditional, or the weaker model of autoguidance
GUIDED = 8  # captions at each of these
SEARCHED = 1_024  # images of a split that captions are taken from
MADE_OF = "made_of.json"  # written last: a hash of the model and the recipe


def sample_sheets(workdir: Path, train_set: Dataset, test_set: Dataset) -> None:
    """Samples the sheets of a run, unless its folder has those of the same model and recipe."""
    model, params = load(workdir)
    recipe, folder, made_up = recipe_of_run(model, train_set), workdir / FOLDER, model.origin.config.sampling.prompts
    depends_on = [fingerprint(model, params), to_json(recipe), list(made_up)]
    made_of = {"hash": hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]}
    if not recipe.num or ((folder / MADE_OF).exists() and read_json(folder / MADE_OF) == made_of):
        return
    folder.mkdir(exist_ok=True)
    sample, scale = make_prompt_sampler(model, params, recipe), recipe.guidance.scale
    for name, split in (("training", train_set), ("held_out", test_set)):
        prompts, images = captioned(split, ROWS)
        samples = sample(prompts, [scale] * (COLUMNS - 1))
        save(folder / f"{name}.png", np.concatenate([images[:, None], samples], 1), prompts)
    if made_up:
        save(folder / "made_up.png", sample(list(made_up), [scale] * COLUMNS), list(made_up))
    prompts, _ = captioned(train_set, GUIDED)
    save(folder / "guidance.png", sample(prompts, SCALES), prompts)
    labels = np.array(test_set.present)[: recipe.num]
    images = sample([test_set.class_names[label] for label in labels], [scale])[:, 0]
    with atomic(folder / "held_out.npz") as temporary:
        np.savez_compressed(temporary, images=images, labels=labels.astype(np.int32))
    write_json(folder / MADE_OF, made_of)


def make_prompt_sampler(
    model: LatentDiffusion, params: Params, recipe: Recipe
) -> Callable[[list[str], Sequence[float]], np.ndarray]:
    """A function of P prompts and N guidance scales -> images uint8 [P, N, H, W, C]; all else is as in the recipe."""
    batch_size = smallest_batch(recipe.num, model.defaults.batch_size, jax.local_device_count())
    guides, table = guidance_models(recipe, model, params), make_table(model, recipe.solving)
    sampler, params = guides.sampler(model, batch_size), replicate(params | guides.params)

    def sample(prompts: list[str], scales: Sequence[float]) -> np.ndarray:
        labels = np.repeat(np.arange(len(prompts)), len(scales))
        by_prompt = recipe._replace(num=len(labels), prompts=prompts, labels=labels.tolist())
        _, inputs = sample_inputs(model, params, by_prompt, sampler)
        guidance = np.tile(np.float32(scales), len(prompts))
        inputs = inputs._replace(samples=inputs.samples._replace(guidance=guidance))
        images = np.concatenate(list(sampler.images(params, inputs, table)))
        return images.reshape(len(prompts), len(scales), *images.shape[1:])

    return sample


def captioned(dataset: Dataset, num: int) -> tuple[list[str], np.ndarray]:
    """`num` captions or fewer, evenly from the first images of a split, and an image of each, uint8 [P, H, W, C]."""
    searched = dataset[np.arange(min(len(dataset), SEARCHED))]
    labels, first = np.unique(searched["label"], return_index=True)
    chosen = np.unique(np.linspace(0, len(labels) - 1, num).round().astype(int))
    return [dataset.class_names[label] for label in labels[chosen]], searched["x"][first[chosen]]


def of_classes(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """The first image of each of these classes in a split, uint8 [P, H, W, C]."""
    present, first = np.unique(dataset[np.arange(len(dataset))]["label"], return_index=True)
    return dataset[first[np.searchsorted(present, labels)]]["x"]


def save(path: Path, images: np.ndarray, prompts: list[str]) -> None:
    """Writes a grid with a row of images [P, N, H, W, C] for each prompt."""
    sheet = image_grids.grid(images.reshape(-1, *images.shape[2:]), columns=images.shape[1], row_labels=prompts)
    image_grids.save_png(sheet, path)
