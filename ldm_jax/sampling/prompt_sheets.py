"""What a run told of texts draws by prompts: sheets to look at, and pictures to score.

prompts/training.png   captions of the training split, the true picture first
prompts/held_out.png   the same of captions of the test split; by as many as there are samples, held_out.npz
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
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline.model import Trained
from ldm_jax.runtime import files as runtime_files
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import generate, image_grids, sample_images
from ldm_jax.sampling.generate import smallest_batch
from ldm_jax.sampling.recipe import Recipe, of_config

FOLDER = "prompts"
ROWS, COLUMNS = 12, 8
SCALES = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)  # 0: told nothing
SWEPT = 8  # captions whose guidance is swept
LOOKED_AT = 1_024  # pictures of a split that captions are taken from
MADE_OF = "made_of.json"  # written last: a hash of what the sheets depend on


def draw(workdir: Path, train_set: Dataset, test_set: Dataset) -> None:
    """Draws the sheets of a run, unless its folder has just these already."""
    model = pipeline_load.load(workdir)
    recipe, folder = of_config(model, train_set), workdir / FOLDER
    asked = [pipeline_model.fingerprint(model), recipe._asdict(), list(model.config.sampling.prompts)]
    made_of = {"asked": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}
    if not recipe.num or ((folder / MADE_OF).exists() and runtime_files.read_json(folder / MADE_OF) == made_of):
        return
    folder.mkdir(exist_ok=True)
    drawn_by, scale = make_drawer(model, recipe), recipe.guidance
    for name, split in (("training", train_set), ("held_out", test_set)):
        prompts, real = captioned(split, ROWS)
        drawn = drawn_by(prompts, [scale] * (COLUMNS - 1))
        save(folder / f"{name}.png", np.concatenate([real[:, None], drawn], 1), prompts)
    if made_up := list(model.config.sampling.prompts):
        save(folder / "made_up.png", drawn_by(made_up, [scale] * COLUMNS), made_up)
    swept, _ = captioned(train_set, SWEPT)
    save(folder / "guidance.png", drawn_by(swept, SCALES), swept)
    numbers = np.array(test_set.present)[: recipe.num]
    images = drawn_by([test_set.class_names[n] for n in numbers], [scale])[:, 0]
    with runtime_files.atomic(folder / "held_out.npz") as temporary:
        np.savez_compressed(temporary, images=images, labels=numbers.astype(np.int32))
    runtime_files.write_json(folder / MADE_OF, made_of)


def make_drawer(model: Trained, recipe: Recipe) -> Callable[[list[str], Sequence[float]], np.ndarray]:
    """(P prompts, N guidance scales) -> uint8 [P, N, H, W, C]; the rest is as in the recipe. Compiled once."""
    batch_size = smallest_batch(recipe.num, model.config.sampling.batch_size, jax.local_device_count())
    generator, table = generate.generator_of(model, batch_size), sample_images.table_for(model, recipe)
    params = replicate(model.params)

    def drawn_by(prompts: list[str], scales: Sequence[float]) -> np.ndarray:
        shape = len(prompts), len(scales)
        labels = np.repeat(np.arange(shape[0]), shape[1])
        wanted = recipe._replace(num=len(labels), prompts=prompts, labels=labels.tolist())
        request = sample_images.request_for(model, wanted, table, None, lambda known: None)
        request = request._replace(guidance=np.tile(np.float32(scales), shape[0]))
        images = np.concatenate(list(generator.images(params, request, table)))
        return images.reshape(*shape, *images.shape[1:])

    return drawn_by


def captioned(dataset: Dataset, num: int) -> tuple[list[str], np.ndarray]:
    """`num` captions or fewer, evenly from the first pictures of a split, and a picture of each, uint8 [P, H, W, C]."""
    looked_at = dataset[np.arange(min(len(dataset), LOOKED_AT))]
    numbers, first = np.unique(looked_at["label"], return_index=True)
    chosen = np.unique(np.linspace(0, len(numbers) - 1, num).round().astype(int))
    return [dataset.class_names[number] for number in numbers[chosen]], looked_at["x"][first[chosen]]


def of_classes(dataset: Dataset, numbers: np.ndarray) -> np.ndarray:
    """A picture of each of these classes, the first that a split has, uint8 [P, H, W, C]."""
    found, first = np.unique(dataset[np.arange(len(dataset))]["label"], return_index=True)
    return dataset[first[np.searchsorted(found, numbers)]]["x"]


def save(path: Path, images: np.ndarray, prompts: list[str]) -> None:
    """A row of pictures [P, N, H, W, C] for each prompt."""
    sheet = image_grids.grid(images.reshape(-1, *images.shape[2:]), columns=images.shape[1], row_labels=prompts)
    image_grids.save_png(sheet, path)
